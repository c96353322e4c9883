"""Products of signs in bfloat16, their sums and results in float32.

Signs are exact in bfloat16 and their sums in float32, so a GPU's tensor cores give the
integers of float32. Going back, what is rounded is the incoming gradient, once: its
other operand is signs. (JAX's own transposition would widen both to float32.)
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

_LETTERS = "DHW"


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


def input_gradient(
    geometry: Geometry, groups: int, g: jax.Array, kernel: jax.Array
) -> jax.Array:
    """The gradient at a convolution's input, in float32.

    Args:
      geometry: The convolution's.
      groups: How many groups the channels fall into.
      g: The gradient at its result, `[N, *out, C_out]`.
      kernel: `[*window, C / groups, C_out]`, in the dtype of `g`.

    Returns:
      `[N, *spatial, C]`.
    """
    if _pointwise(geometry, groups):
        matrix = kernel.reshape(kernel.shape[-2:])
        return jnp.matmul(g, matrix.T, preferred_element_type=jnp.float32)
    rank, features = len(geometry.window), kernel.shape[-1]
    turned = jnp.flip(kernel, range(rank))
    turned = turned.reshape(*turned.shape[:-1], groups, features // groups)
    turned = jnp.moveaxis(turned, (-3, -1), (-1, -3))
    turned = turned.reshape(*geometry.window, features // groups, -1)
    axes = _LETTERS[-rank:]
    return lax.conv_general_dilated(
        g,
        turned,
        (1,) * rank,
        geometry.transposed_padding,
        lhs_dilation=geometry.strides,
        rhs_dilation=geometry.dilation,
        feature_group_count=groups,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        preferred_element_type=jnp.float32,
    )


def kernel_gradient(
    geometry: Geometry, groups: int, x: jax.Array, g: jax.Array
) -> jax.Array:
    """The gradient at a convolution's kernel, in float32.

    Args:
      geometry: The convolution's.
      groups: How many groups the channels fall into.
      x: Its input, `[N, *spatial, C]`.
      g: The gradient at its result, `[N, *out, C_out]`, in the dtype of `x`.

    Returns:
      `[*window, C / groups, C_out]`.
    """
    if _pointwise(geometry, groups):
        rows = tuple(range(g.ndim - 1))
        contracted = ((rows, rows), ((), ()))
        matrix = lax.dot_general(x, g, contracted, preferred_element_type=jnp.float32)
        return matrix.reshape(*geometry.window, *matrix.shape)
    axes = _LETTERS[-len(geometry.window) :]
    sides = zip(geometry.padding, geometry.unread, strict=True)
    return lax.conv_general_dilated(
        x,
        g,
        geometry.dilation,
        [(before, after - unread) for (before, after), unread in sides],
        rhs_dilation=geometry.strides,
        batch_group_count=groups,
        dimension_numbers=(f"C{axes}N", f"I{axes}O", f"{axes}NC"),
        preferred_element_type=jnp.float32,
    )


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
    d_signs = input_gradient(geometry, groups, scaled, sign(kernel).astype(dtype))
    d_kernel = kernel_gradient(geometry, groups, signs, plain)
    return d_signs.astype(g.dtype), d_kernel.astype(kernel.dtype)


scaled_product.defvjp(_forward, _backward)


def _pointwise(geometry: Geometry, groups: int) -> bool:
    """Whether the convolution is one product of matrices."""
    one = prod(geometry.window) == prod(geometry.strides) == groups == 1
    return one and not geometry.padded
