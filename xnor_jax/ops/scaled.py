"""Products of signs in floats: integer sums, one scale per channel, and the gradient.

With bfloat16 operands the sums are float32. Signs are exact in bfloat16 and their sums
in float32, so a GPU's tensor cores give the same integers as in float32. In the
backward pass the incoming gradient is rounded; the other operand is signs. The gradient
of the signs is rounded once more: cuDNN multiplies in bfloat16 only if the result is
bfloat16, and XLA widens the operands of any other convolution. The gradient of the
kernel stays in float32, in which it is summed over devices.
"""

from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from xnor_jax import convolution
from xnor_jax._kernel import scale, sign, wide_dtype
from xnor_jax.geometry import DENSE, Geometry


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x` rounded to the precision of `dtype`, in the dtype of `x`."""
    # Not a round trip through astype, which XLA may remove: it allows itself excess
    # precision.
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(x, kind.nexp, kind.nmant)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def scaled_product(
    geometry: Geometry,
    groups: int,
    keep_rate: float,
    dtype: DTypeLike | None,
    signs: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """`α/keep_rate · (signs ⊛ sign(w))`, with the gradient of `signs ⊛ w̃/keep_rate`.

    The kernel's gradient is that at `w̃ = α·sign(w)`; the caller applies the rule.

    Args:
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: The number of channel groups.
      keep_rate: The fraction of signs that dropout keeps; 1 without dropout.
      dtype: The dtype of the products' operands; None for that of `signs`.
      signs: Activations in {−1, 0, +1}, `[N, *spatial, C]`.
      kernel: The latent kernel `w`, `[*window, C / groups, C_out]`.

    Returns:
      `[N, *out, C_out]`, in the dtype of `signs`.
    """
    return _forward(geometry, groups, keep_rate, dtype, signs, kernel)[0]


def _forward(geometry, groups, keep_rate, dtype, signs, kernel):
    # α keeps the kernel's dtype: a narrower one may not represent it.
    alpha = scale(kernel) / keep_rate
    operand = signs if dtype is None else signs.astype(dtype)
    sums = _product(
        geometry,
        groups,
        operand,
        sign(kernel).astype(operand.dtype),
        accumulator=wide_dtype(operand),
    )
    y = (alpha.astype(sums.dtype) * sums).astype(signs.dtype)
    return y, (operand, kernel, alpha)


def _backward(geometry, groups, keep_rate, dtype, residuals, g):
    signs, kernel, alpha = residuals
    if dtype is None:

        def product(signs, kernel):
            return _product(geometry, groups, signs, kernel.astype(signs.dtype))

        d_signs, d_kernel = jax.vjp(product, signs, alpha * sign(kernel))[1](g)
        return d_signs, d_kernel / keep_rate
    unscaled, scaled = (
        rounded(a, dtype).astype(dtype) for a in (g, alpha.astype(g.dtype) * g)
    )
    d_signs = _signs_gradient(geometry, groups, signs, kernel, scaled)
    d_kernel = _kernel_gradient(geometry, groups, signs, kernel, unscaled)
    # XLA may have kept the precision of the sums.
    d_signs = rounded(d_signs.astype(g.dtype), dtype)
    return d_signs, d_kernel.astype(kernel.dtype) / keep_rate


scaled_product.defvjp(_forward, _backward)


def _product(geometry, groups, x, kernel, accumulator=None):
    if geometry == DENSE:
        return convolution.dot(x, kernel, accumulator=accumulator)
    return convolution.conv(
        x, kernel, **geometry.options, groups=groups, accumulator=accumulator
    )


def _signs_gradient(geometry, groups, signs, kernel, g):
    kernel = sign(kernel).astype(g.dtype)
    if _pointwise(geometry, groups):
        return convolution.dot(g, kernel.reshape(kernel.shape[-2:]).T)
    conv = partial(convolution.xla_conv, groups=groups, **geometry.options)
    return jax.linear_transpose(lambda signs: conv(signs, kernel), signs)(g)[0]


def _kernel_gradient(geometry, groups, signs, kernel, g):
    if _pointwise(geometry, groups):
        rows = tuple(range(g.ndim - 1))
        contracted = ((rows, rows), ((), ()))
        matrix = lax.dot_general(
            signs, g, contracted, preferred_element_type=jnp.float32
        )
        return matrix.reshape(kernel.shape)
    conv = partial(convolution.xla_conv, groups=groups, **geometry.options)
    signs, kernel, g = (a.astype(jnp.float32) for a in (signs, kernel, g))
    return jax.linear_transpose(lambda kernel: conv(signs, kernel), kernel)(g)[0]


def _pointwise(geometry: Geometry, groups: int) -> bool:
    """Whether the convolution is a single matrix product."""
    one = prod(geometry.window) == prod(geometry.strides) == groups == 1
    return one and not geometry.padded
