"""Operations of packed networks: products with an epilogue, and pools."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xnor_jax import convolution
from xnor_jax.geometry import (
    DENSE,
    Geometry,
    Padding,
    conv_geometry,
    pool_geometry,
    positive,
)
from xnor_jax.ops import _inference, backends
from xnor_jax.ops._mesh import over_images
from xnor_jax.ops.bits import WORD, Bits, check_words, words_for
from xnor_jax.ops.conv import check_channels
from xnor_jax.ops.epilogue import Epilogue, Threshold, check_epilogue
from xnor_jax.ops.kernel import PackedKernel


def sign_bits(x: ArrayLike, *, backend: str = "auto") -> Bits:
    """Pack the signs of the last axis into `Bits`.

    Args:
      x: `[..., C]`, floating.
      backend: `"auto"`, or one of `available_backends()`; all give the same words.

    Returns:
      Bits of the shape of `x`.

    Raises:
      ValueError: If `x` has no axis, or the backend is unknown.
      TypeError: If it is not floating point, or when differentiated.
      RuntimeError: If the backend is not available.
    """
    x = _inference.check_floating("sign_bits", "x", x)
    if x.ndim < 1:
        raise ValueError("sign_bits: expected at least one axis, got a scalar")
    backend = backends.resolve("sign_bits", backend)
    return Bits(_sign_bits(x, backend=backend), x.shape[-1])


def packed_conv(
    x: Bits,
    kernel: PackedKernel,
    epilogue: Epilogue,
    *,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> jax.Array | Bits:
    """The convolution of packed signs with 1 to 3 spatial axes, and an epilogue.

    Taps outside the image add 0.

    Args:
      x: Bits of shape `[N, *spatial, C]`.
      kernel: A packed kernel `[*window, C / groups, C_out]`.
      epilogue: `Sums()`, `Affine(…)` or `Threshold(…)` with an int32 threshold.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      dilation: The kernel's dilation; one number, or one per spatial axis.
      groups: The number of channel groups, as given to `pack_kernel`.
      backend: `"auto"`, or one of `available_backends()`.

    Returns:
      int32 or float32 `[N, *out, C_out]`, or Bits of that shape.

    Raises:
      ValueError: If shapes, channels, groups or the geometry do not fit, or the backend
        is unknown or does not support the rank.
      TypeError: If a dtype is wrong, or when differentiated.
      RuntimeError: If the backend is not available.
    """
    _check_operands("packed_conv", x, kernel, epilogue)
    rank = len(kernel.window)
    if not 1 <= rank <= 3 or x.words.ndim != rank + 2:
        raise ValueError(
            "packed_conv: expected images [N, *spatial, C] and a kernel of 1 to 3 "
            f"spatial axes, got {x.shape} and a window of {kernel.window}"
        )
    if positive("packed_conv", "groups", groups) != kernel.groups:
        raise ValueError(
            f"packed_conv: expected groups={kernel.groups}, with which the kernel was "
            f"packed, got {groups}"
        )
    geometry = conv_geometry(
        "packed_conv",
        x.words.shape[1:-1],
        kernel.window,
        strides=strides,
        padding=padding,
        dilation=dilation,
    )
    backend = backends.resolve("packed_conv", backend, rank)
    y = _packed_conv(x, kernel, epilogue, geometry=geometry, backend=backend)
    return Bits(y, kernel.out_features) if isinstance(epilogue, Threshold) else y


def packed_matmul(
    x: Bits, kernel: PackedKernel, epilogue: Epilogue, *, backend: str = "auto"
) -> jax.Array | Bits:
    """The matrix product of packed signs, and an epilogue.

    Args:
      x: Bits of shape `[..., C]`.
      kernel: A packed dense kernel `[C, C_out]`.
      epilogue: `Sums()`, `Affine(…)` or `Threshold(…)` with an int32 threshold.
      backend: `"auto"`, or one of `available_backends()`.

    Returns:
      int32 or float32 `[..., C_out]`, or Bits of that shape.

    Raises:
      ValueError: If the shapes do not fit, or the backend is unknown.
      TypeError: If a dtype is wrong, or when differentiated.
      RuntimeError: If the backend is not available.
    """
    _check_operands("packed_matmul", x, kernel, epilogue)
    if kernel.window or kernel.groups != 1:
        raise ValueError(
            "packed_matmul: expected a dense kernel of one group, got a window of "
            f"{kernel.window} and {kernel.groups} groups"
        )
    backend = backends.resolve("packed_matmul", backend)
    y = _packed_matmul(x, kernel, epilogue, backend=backend)
    return Bits(y, kernel.out_features) if isinstance(epilogue, Threshold) else y


def real_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    epilogue: Epilogue,
    *,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
) -> jax.Array | Bits:
    """A convolution of float32 arrays with 1 to 3 spatial axes, and an epilogue.

    The backends agree up to rounding.

    Args:
      x: Images `[N, *spatial, C]`, float32.
      kernel: `[*window, C / groups, C_out]`, float32.
      epilogue: `Sums()`, `Affine(…)` or `Threshold(…)` with a float32 threshold.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      dilation: The kernel's dilation; one number, or one per spatial axis.
      groups: The number of channel groups.
      backend: `"auto"`, or one of `available_backends()`; `"cpu"` supports only two
        spatial axes and one group.

    Returns:
      float32 `[N, *out, C_out]`, or Bits of that shape.

    Raises:
      ValueError: If shapes, channels, groups or the geometry do not fit, or the backend
        is unknown or does not support the rank or groups.
      TypeError: If a dtype is wrong, or when differentiated.
      RuntimeError: If the backend is not available.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    for name, array in (("x", x), ("kernel", kernel)):
        _check_float32("real_conv", name, array)
    groups = check_channels("real_conv", x, kernel, groups)
    features = kernel.shape[-1]
    check_epilogue("real_conv", epilogue, features, jnp.float32)
    geometry = conv_geometry(
        "real_conv",
        x.shape[1:-1],
        kernel.shape[:-2],
        strides=strides,
        padding=padding,
        dilation=dilation,
    )
    backend = backends.resolve("real_conv", backend, len(geometry.window))
    if len(geometry.window) != 2 or groups != 1:
        if backend == "cpu":
            raise ValueError(
                "real_conv: the backend 'cpu' supports only 2 spatial axes and one "
                f"group, got {len(geometry.window)} and {groups}; use 'auto' or 'xla'"
            )
        backend = "xla"
    options = {"geometry": geometry, "groups": groups, "backend": backend}
    y = _real_conv(x, kernel, epilogue, **options)
    return Bits(y, features) if isinstance(epilogue, Threshold) else y


def pool_bits(
    x: Bits,
    flip: ArrayLike,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
) -> Bits:
    """The signs of a max-pool, computed from the signs of its input.

    `sign(f(max xᵢ))` from the signs `sign(f(xᵢ))`, where `f` is increasing in channels
    with flip bit 0 and decreasing in those with flip bit 1. Taps outside the image are
    ignored.

    Args:
      x: Bits of shape `[N, *spatial, C]`, one to three spatial axes.
      flip: uint32 words `[ceil(C / 32)]`, as in `Threshold`.
      window: One number, or one per spatial axis.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after),
        smaller than the window.

    Returns:
      Bits of shape `[N, *out, C]`.

    Raises:
      ValueError: If shapes or the geometry do not fit.
      TypeError: If words are not uint32.
    """
    flip = jnp.asarray(flip)
    _check_bits("pool_bits", x)
    check_words("pool_bits", flip)
    if flip.shape != x.words.shape[-1:]:
        raise ValueError(
            f"pool_bits: expected flip of shape {x.words.shape[-1:]}, got {flip.shape}"
        )
    geometry = _pool("pool_bits", x.words, window, strides, padding)
    return Bits(_pool_bits(x.words, flip, geometry=geometry), x.size)


def sum_pool_bits(
    x: ArrayLike,
    threshold: Threshold,
    *,
    window: int | Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    backend: str = "auto",
) -> Bits:
    """The sums of windows, thresholded to bits.

    Each sum is added one value at a time, row by row. Taps outside the image add 0.

    Args:
      x: Images `[N, H, W, C]`, float32.
      threshold: The epilogue of the sums, with a float32 threshold.
      window: One number, or one per spatial axis.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      backend: `"auto"`, or one of `available_backends()`; all give the same bits.

    Returns:
      Bits of shape `[N, *out, C]`.

    Raises:
      ValueError: If shapes or the geometry do not fit, or the backend is unknown.
      TypeError: If a dtype is wrong, or when differentiated.
      RuntimeError: If the backend is not available.
    """
    x = jnp.asarray(x)
    _check_float32("sum_pool_bits", "x", x)
    if x.ndim != 4:
        raise ValueError(f"sum_pool_bits: expected images [N, H, W, C], got {x.shape}")
    if not isinstance(threshold, Threshold):
        raise TypeError(
            f"sum_pool_bits: expected a Threshold, got {type(threshold).__name__}"
        )
    check_epilogue("sum_pool_bits", threshold, x.shape[-1], jnp.float32)
    geometry = _pool("sum_pool_bits", x, window, strides, padding)
    backend = backends.resolve("sum_pool_bits", backend)
    return Bits(
        _sum_pool_bits(x, threshold, geometry=geometry, backend=backend), x.shape[-1]
    )


def _check_bits(where: str, x: Bits) -> None:
    if not isinstance(x, Bits):
        raise TypeError(f"{where}: expected Bits, got {type(x).__name__}")
    check_words(where, x.words)
    if x.words.ndim < 1 or x.words.shape[-1] != words_for(x.size):
        raise ValueError(
            f"{where}: expected {words_for(x.size)} words for {x.size} signs, got "
            f"{x.words.shape}"
        )


def _check_operands(where: str, x: Bits, kernel: PackedKernel, epilogue: Epilogue):
    _check_bits(where, x)
    if not isinstance(kernel, PackedKernel):
        raise TypeError(
            f"{where}: expected a PackedKernel, got {type(kernel).__name__}; see "
            "pack_kernel"
        )
    check_words(where, kernel.words)
    shape, groups = kernel.words.shape, kernel.groups
    panels = words_for(kernel.out_features // max(groups, 1))
    wanted = (groups, panels, *shape[2:-2], words_for(kernel.in_features), WORD)
    if len(shape) < 4 or shape != wanted or kernel.out_features % groups:
        raise ValueError(
            f"{where}: expected kernel words of shape [groups, panels, *window, "
            f"{words_for(kernel.in_features)}, {WORD}] for {kernel.in_features} input "
            f"and {kernel.out_features} output channels, got {shape}"
        )
    if x.size != kernel.in_features * groups:
        raise ValueError(
            f"{where}: expected {kernel.in_features * groups} input channels for a "
            f"kernel of {kernel.in_features} and groups={groups}, got {x.size}"
        )
    check_epilogue(where, epilogue, kernel.out_features, jnp.int32)


def _check_float32(where: str, name: str, x: jax.Array) -> None:
    if x.dtype != jnp.float32:
        raise TypeError(f"{where}: expected {name} of float32, got {x.dtype}")


def _pool(where, x, window, strides, padding) -> Geometry:
    rank = x.ndim - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{where}: expected images [N, *spatial, C] of 1 to 3 spatial axes, got "
            f"{rank + 2} axes"
        )
    spatial = x.shape[1:-1]
    return pool_geometry(where, spatial, window, strides=strides, padding=padding)


def regroup(words: jax.Array, size: int, groups: int) -> jax.Array:
    """Align each group of channels to a word boundary.

    Args:
      words: uint32 `[..., ceil(size / 32)]`.
      size: The number of channels; a multiple of `groups`.
      groups: The number of channel groups.

    Returns:
      uint32 `[..., groups, ceil(size / groups / 32)]`.
    """
    each = size // groups
    if groups == 1 or each % WORD == 0:
        return words.reshape(*words.shape[:-1], groups, words_for(each))
    # Word c of a group begins `shift` bits into one word and ends in the next.
    first = each * np.arange(groups)[:, None] + WORD * np.arange(words_for(each))
    low, shift = first // WORD, jnp.asarray(first % WORD, jnp.uint32)
    high = np.minimum(low + 1, words.shape[-1] - 1)
    # In two steps, since a shift by 32 bits is undefined.
    above = (words[..., high] << 1) << (WORD - 1 - shift)
    used = np.minimum(each - WORD * np.arange(words_for(each)), WORD)
    mask = np.array([(1 << int(count)) - 1 for count in used], np.uint32)
    return ((words[..., low] >> shift) | above) & mask


@over_images
@partial(jax.jit, static_argnames=("backend",))
def _sign_bits(x, *, backend: str) -> jax.Array:
    return backends.pack(backend, _inference.no_gradient("sign_bits", x))


@over_images
@partial(jax.jit, static_argnames=("geometry", "backend"))
def _packed_conv(x, kernel, epilogue, *, geometry: Geometry, backend: str) -> jax.Array:
    epilogue = _inference.no_gradient("packed_conv", epilogue)
    words = regroup(x.words, x.size, kernel.groups)
    return backends.conv_words(
        "packed_conv", backend, words, kernel, epilogue, geometry
    )


@over_images
@partial(jax.jit, static_argnames=("backend",))
def _packed_matmul(x, kernel, epilogue, *, backend: str) -> jax.Array:
    epilogue = _inference.no_gradient("packed_matmul", epilogue)
    rows = x.words.reshape(-1, 1, x.words.shape[-1])
    y = backends.conv_words("packed_matmul", backend, rows, kernel, epilogue, DENSE)
    return y.reshape(*x.words.shape[:-1], y.shape[-1])


@over_images
@partial(jax.jit, static_argnames=("geometry", "groups", "backend"))
def _real_conv(x, kernel, epilogue, *, geometry: Geometry, groups: int, backend: str):
    x, kernel, epilogue = _inference.no_gradient("real_conv", (x, kernel, epilogue))
    return backends.real_conv(backend, x, kernel, epilogue, geometry, groups)


@over_images
@partial(jax.jit, static_argnames=("geometry",))
def _pool_bits(words, flip, *, geometry: Geometry) -> jax.Array:
    identity = jnp.uint32(0xFFFFFFFF)
    pads = ((0, 0), *geometry.padding, (0, 0))
    padded = jnp.pad(words ^ flip, pads, constant_values=identity)
    return convolution.reduce_windows(jnp.bitwise_and, padded, geometry) ^ flip


@over_images
@partial(jax.jit, static_argnames=("geometry", "backend"))
def _sum_pool_bits(x, threshold, *, geometry: Geometry, backend: str) -> jax.Array:
    x, threshold = _inference.no_gradient("sum_pool_bits", (x, threshold))
    return backends.sum_pool_bits(backend, x, threshold, geometry)
