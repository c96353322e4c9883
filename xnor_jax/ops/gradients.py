"""The input gradient of a convolution on a CPU, by the compiled library.

This module chooses the formulation; `experiments/benchmarks/input_gradient.py` measures
the candidates.
"""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax import convolution
from xnor_jax.geometry import Geometry
from xnor_jax.ops import cpu
from xnor_jax.ops.bits import WORD, words_for
from xnor_jax.ops.cpu import operations
from xnor_jax.ops.epilogue import Sums

# The number of multiplications that take as long as adding one value in col2im; equal
# to kAdded in engine/xla/col2im.cc.
_ADDED = 16
# The largest number of values in an image's patches: 8 MiB of memory per thread.
_MAX_PATCH_VALUES = 1 << 21


def input_gradient(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient with respect to the images, float32 `[N, *spatial, C]`.

    Args:
      geometry: The windows over the images.
      g: The result's gradient, float32 `[N, *out, C_out]`.
      kernel: float32 `[*window, C, C_out]`.
    """
    single = prod(geometry.window) == prod(geometry.strides) == 1
    if single and not geometry.padded:
        columns = kernel.reshape(kernel.shape[-2:])
        return convolution.dot(g, columns.swapaxes(0, 1))
    formulation = col2im if takes_col2im(geometry, kernel) else transposed
    return formulation(geometry, g, kernel)


def takes_col2im(geometry: Geometry, kernel: jax.Array) -> bool:
    """Whether to use `col2im`: it fits into memory and is estimated to be faster.

    Both formulations pad their columns to whole panels. `col2im` multiplies at each
    pixel of the result and sums overlapping patches; `transposed` multiplies at each
    pixel of the image, including the zeros of padding and strides.
    """

    def panels(columns: int) -> int:
        return words_for(columns) * WORD

    taps, (channels, features) = prod(geometry.window), kernel.shape[-2:]
    if prod(geometry.out) * taps * channels > _MAX_PATCH_VALUES:
        return False
    patch = features * panels(taps * channels) + _ADDED * taps * channels
    window = features * panels(channels) * taps
    return prod(geometry.out) * patch < prod(geometry.spatial) * window


def col2im(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of each window's patch, summed where patches overlap."""
    channels, features = kernel.shape[-2:]
    unit = (1,) * len(geometry.window)
    taps = kernel.reshape(-1, features).swapaxes(0, 1).reshape(*unit, features, -1)
    patches = operations.real_conv(taps, Sums())
    add = operations.col2im(geometry)
    return cpu.run(g, [patches, add], geometry.spatial, channels, jnp.float32)


def transposed(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transposed convolution: the gradient convolved with the flipped kernel."""
    flipped = jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)
    window, strides = geometry.window, geometry.strides
    pads = geometry.transposed_padding
    if prod(strides) > 1 or min(map(min, pads)) < 0:
        spread = [(*pad, stride - 1) for pad, stride in zip(pads, strides, strict=True)]
        g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
        pads = ((0, 0),) * len(window)
    unit = (1,) * len(window)
    back = Geometry(g.shape[1:-1], window, unit, pads, geometry.dilation)
    operation = operations.real_conv(flipped, Sums(), back)
    return cpu.run(g, [operation], geometry.spatial, flipped.shape[-1], jnp.float32)
