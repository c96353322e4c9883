"""Products of signs in bfloat16, their sums in float32.

Signs are exact in bfloat16 and their sums in float32, so a GPU's tensor cores give the
integers of float32. Going back, the incoming gradient is rounded, its other operand is
signs, and what comes out is rounded again: cuDNN multiplies in bfloat16 only where the
result is of it, and XLA widens the operands of any other convolution to float32.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from xnor_jax import convolution
from xnor_jax._kernel import scale, sign
from xnor_jax.ops._geometry import DENSE, Geometry


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The numbers that `dtype` has for `x`, in the dtype of `x`."""
    # Not there and back by astype, which XLA may leave out: it may compute with more
    # precision than it is asked for.
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def scaled_product(
    geometry: Geometry,
    groups: int,
    dtype: DTypeLike,
    signs: jax.Array,
    binary_kernel: jax.Array,
) -> jax.Array:
    """`α · (signs ⊛ sign(w))` for `w̃ = α·sign(w)`, and the gradient of `signs ⊛ w̃`.

    Args:
      geometry: The window's way over the image; `DENSE` for `[N, C]`.
      groups: How many groups the channels fall into.
      dtype: Of the products' operands.
      signs: Activations in {−1, 0, +1}, `[N, *spatial, C]`.
      binary_kernel: `w̃`, `[*window, C / groups, C_out]`.

    Returns:
      `[N, *out, C_out]`, in the dtype of `signs`.
    """
    return _forward(geometry, groups, dtype, signs, binary_kernel)[0]


def _forward(geometry, groups, dtype, signs, binary_kernel):
    narrow, kernel = signs.astype(dtype), sign(binary_kernel).astype(dtype)
    if geometry == DENSE:
        sums = convolution.dot(narrow, kernel, accumulator=jnp.float32)
    else:
        sums = convolution.conv(
            narrow,
            kernel,
            strides=geometry.strides,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=groups,
            accumulator=jnp.float32,
        )
    y = (scale(binary_kernel).astype(sums.dtype) * sums).astype(signs.dtype)
    return y, (narrow, binary_kernel)


def _backward(geometry, groups, dtype, residuals, g):
    signs, kernel = residuals
    plain, scaled = (
        rounded(a, dtype).astype(dtype) for a in (g, scale(kernel).astype(g.dtype) * g)
    )
    product = partial(_product, geometry, groups)
    kernel_signs = sign(kernel).astype(dtype)
    to_signs = jax.linear_transpose(lambda s: product(s, kernel_signs), signs)
    to_kernel = jax.linear_transpose(lambda k: product(signs, k), kernel_signs)
    (d_signs,), (d_kernel,) = to_signs(scaled), to_kernel(plain)
    # Once more: XLA may have kept the precision of its sums.
    return (
        rounded(d_signs.astype(g.dtype), dtype),
        rounded(d_kernel.astype(kernel.dtype), dtype),
    )


def _product(geometry, groups, signs, kernel):
    """The convolution in the dtype of its operands, as XLA's one operation."""
    pixels = prod(geometry.window) == prod(geometry.strides) == groups == 1
    if pixels and not geometry.padded:
        return convolution.dot(signs, kernel.reshape(kernel.shape[-2:]))
    return convolution.xla_conv(signs, kernel, groups=groups, **geometry.way)


scaled_product.defvjp(_forward, _backward)
