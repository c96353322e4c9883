"""The gradient of a convolution's images on a CPU, by the compiled library.

The place that decides how it is computed; `input_gradient.py` among the benchmarks
measures what it chooses from.
"""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax import convolution
from xnor_jax.geometry import Geometry
from xnor_jax.ops import cpu
from xnor_jax.ops.bits import WORD, words_for
from xnor_jax.ops.cpu import steps
from xnor_jax.ops.epilogue import Sums

# So many multiplications take the time of adding up a number of a patch in col2im.cc.
_ADDED = 16
# Numbers of an image's patches that memory is taken for, a thread: 8 MiB.
_LARGEST = 1 << 21


def input_gradient(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The images' gradient, float32 `[N, *spatial, C]`, from the result's.

    Args:
      geometry: The windows over the images.
      g: float32 `[N, *out, C_out]`.
      kernel: float32 `[*window, C, C_out]`.
    """
    single = prod(geometry.window) == prod(geometry.strides) == 1
    if single and not geometry.padded:
        columns = kernel.reshape(kernel.shape[-2:])
        return convolution.dot(g, columns.swapaxes(0, 1))
    formulation = col2im if takes_col2im(geometry, kernel) else transposed
    return formulation(geometry, g, kernel)


def takes_col2im(geometry: Geometry, kernel: jax.Array) -> bool:
    """Whether `col2im` is to be quicker than `transposed`.

    Both fill up their numbers for a pixel to whole panels. One multiplies at the pixels
    of the result and adds up what overlaps, the other multiplies at those of the image,
    zeros of padding and strides included.
    """

    def panels(columns: int) -> int:
        return words_for(columns) * WORD

    taps, (channels, features) = prod(geometry.window), kernel.shape[-2:]
    if prod(geometry.out) * taps * channels > _LARGEST:
        return False
    patch = features * panels(taps * channels) + _ADDED * taps * channels
    window = features * panels(channels) * taps
    return prod(geometry.out) * patch < prod(geometry.spatial) * window


def col2im(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient of each window's patch, added up where patches overlap."""
    channels, features = kernel.shape[-2:]
    unit = (1,) * len(geometry.window)
    taps = kernel.reshape(-1, features).swapaxes(0, 1).reshape(*unit, features, -1)
    patches = steps.real_conv(taps, Sums())
    add = steps.col2im(geometry.spatial, window=geometry.window, **geometry.options)
    return cpu.run(g, [patches, add], geometry.spatial, channels, jnp.float32)


def transposed(geometry: Geometry, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transposed convolution: the gradient in windows that look the other way."""
    flipped = jnp.flip(kernel, range(kernel.ndim - 2)).swapaxes(-1, -2)
    window, strides = geometry.window, geometry.strides
    pads = geometry.transposed_padding
    if prod(strides) > 1 or min(map(min, pads)) < 0:
        spread = [(*pad, stride - 1) for pad, stride in zip(pads, strides, strict=True)]
        g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
        pads = ((0, 0),) * len(window)
    unit = (1,) * len(window)
    back = Geometry(g.shape[1:-1], window, unit, pads, geometry.dilation)
    step = steps.real_conv(flipped, Sums(), **back.options)
    return cpu.run(g, [step], geometry.spatial, flipped.shape[-1], jnp.float32)
