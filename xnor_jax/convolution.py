"""Float products and pools, each in the fastest formulation for the platform.

This module chooses the formulations; `experiments/benchmarks/formulations.py` measures
them. All formulations agree up to rounding, in values and in gradients.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xnor_jax._kernel import wide_dtype
from xnor_jax.geometry import Geometry, Pads, conv_geometry

# Above this many weights per filter, XLA's CPU convolution is faster.
_LARGEST_PATCH = 512
# Above this many taps, the sum over a window is a loop, to limit compile time.
_LONGEST_CHAIN = 256


@partial(
    jax.jit,
    static_argnames=("strides", "padding", "dilation", "groups", "accumulator"),
)
def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, ...],
    padding: Pads,
    dilation: tuple[int, ...],
    groups: int = 1,
    accumulator: Any = None,
) -> jax.Array:
    """A convolution with 1 to 3 spatial axes, channels last.

    Differentiable in reverse mode only: patch products and groups have a custom VJP.

    Args:
      x: Images, `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`, in the dtype of `x`.
      strides: One per spatial axis.
      padding: Zeros (before, after) each spatial axis.
      dilation: The kernel's dilation, one per spatial axis.
      groups: The number of channel groups.
      accumulator: The dtype of the sums and of the result; None for that of `x`.

    Returns:
      `[N, *out, C_out]`.

    Raises:
      ValueError: If the geometry does not fit.
    """
    unit = (1,) * (kernel.ndim - 2)
    geometry = conv_geometry(
        "conv",
        x.shape[1:-1],
        kernel.shape[:-2],
        strides=strides,
        padding=padding,
        dilation=dilation,
    )
    if groups > 1:
        return _grouped_conv(geometry, groups, accumulator, x, kernel)
    xla = partial(xla_conv, accumulator=accumulator, **geometry.options)

    def pointwise(x, kernel):
        pixels = x[(slice(None), *(slice(None, None, s) for s in strides))]
        matrix = kernel.reshape(kernel.shape[-2:])
        return jnp.matmul(pixels, matrix, preferred_element_type=accumulator)

    if geometry.window == unit and not geometry.padded:
        if strides == unit:
            return pointwise(x, kernel)
        # XLA's GPU compiler fuses the strided slice into the product, and with JAX 0.10
        # fails to compile it.
        return lax.platform_dependent(x, kernel, cpu=pointwise, default=xla)
    if prod(kernel.shape[:-1]) > _LARGEST_PATCH:
        return xla(x, kernel)

    def patches(x, kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return _patch_conv(geometry, accumulator, x, kernel)

    return lax.platform_dependent(x, kernel, cpu=patches, default=xla)


def dot(x: jax.Array, kernel: jax.Array, *, accumulator: Any = None) -> jax.Array:
    """A dense product: `x @ kernel`, `[..., C_in] × [C_in, C_out]`."""
    return jnp.matmul(x, kernel, preferred_element_type=accumulator)


def max_pool(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The largest value of each window, as a maximum of shifted slices.

    On a CPU its gradient is 3 to 5 times faster than that of `reduce_window`. Equal
    maxima of a window share the gradient.

    Args:
      x: `[N, *spatial, C]`, floating.
      geometry: The windows; positions outside the image are ignored.

    Returns:
      `[N, *out, C]`.
    """
    if geometry.padded:
        pads = ((0, 0), *geometry.padding, (0, 0))
        x = jnp.pad(x, pads, constant_values=-jnp.inf)
    return reduce_windows(jnp.maximum, x, geometry)


def reduce_windows(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    geometry: Geometry,
) -> jax.Array:
    """Reduce each window to one value, axis by axis, as shifted slices.

    Args:
      function: The associative reduction of two arrays.
      x: Padded images, `[N, *spatial, C]`.
      geometry: The windows.

    Returns:
      `[N, *out, C]`.
    """
    for axis, shifts in enumerate(geometry.shifts, start=1):
        x = reduce(function, [x[_along(axis, shift)] for shift in shifts])
    return x


def mean_pool(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The mean of each window, summed as in `sum_pool`.

    Args:
      x: `[N, *spatial, C]`, floating.
      geometry: The windows; positions outside the image count as zeros.

    Returns:
      `[N, *out, C]`.
    """
    sums = sum_pool(x.astype(wide_dtype(x)), geometry)
    # XLA turns a division by a constant into this product, but only under jit.
    share = np.ones((), sums.dtype) / np.asarray(prod(geometry.window), sums.dtype)
    return (sums * share).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_pool(x: jax.Array, geometry: Geometry) -> jax.Array:
    """The sum of each window, added one value at a time, row by row.

    The order of the additions, and so the last bit, does not depend on the platform,
    the batch size or the rest of the program.

    Args:
      x: `[N, *spatial, C]`, floating.
      geometry: The windows; positions outside the image are zeros.

    Returns:
      `[N, *out, C]`.
    """
    pads = ((0, 0), *geometry.padding, (0, 0))
    # XLA would contract a multiplication that produces x with the additions into FMAs,
    # which round only once. Replacing negative zeros by zeros prevents this.
    summands = jnp.pad(jnp.where(x == 0, 0, x), pads)
    if prod(geometry.window) <= _LONGEST_CHAIN:
        return reduce(
            jnp.add,
            [summands[(slice(None), *taps)] for taps in product(*geometry.shifts)],
        )
    reach = [shifts[0].stop for shifts in geometry.shifts]
    strided = (slice(None), *(slice(None, None, s) for s in geometry.strides))

    def add(tap, sums):
        places = jnp.unravel_index(tap, geometry.window)
        starts = [at * d for at, d in zip(places, geometry.dilation, strict=True)]
        sizes = (x.shape[0], *reach, x.shape[-1])
        taps = lax.dynamic_slice(summands, (0, *starts, 0), sizes)
        return sums + taps[strided]

    first = summands[(slice(None), *(shifts[0] for shifts in geometry.shifts))]
    return lax.fori_loop(1, prod(geometry.window), add, first)


@sum_pool.defjvp
def _sum_pool_jvp(geometry, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    if geometry.window == geometry.spatial and not geometry.padded:
        axes = tuple(range(1, x.ndim - 1))
        return sum_pool(x, geometry), x_dot.sum(axes, keepdims=True)
    # Transposing the shifts would add to the whole image once per tap.
    y_dot = lax.reduce_window(
        x_dot,
        np.zeros((), x_dot.dtype),
        lax.add,
        (1, *geometry.window, 1),
        (1, *geometry.strides, 1),
        ((0, 0), *geometry.padding, (0, 0)),
        window_dilation=(1, *geometry.dilation, 1),
    )
    return sum_pool(x, geometry), y_dot


def xla_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: tuple[int, ...],
    padding: Pads,
    dilation: tuple[int, ...],
    groups: int = 1,
    accumulator: Any = None,
) -> jax.Array:
    """`conv` as XLA's native convolution, for every platform and shape."""
    letters = "DHW"[3 - (kernel.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        preferred_element_type=accumulator,
    )


def _along(axis: int, index: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, index)


def _unfold(x: jax.Array, axis: int, taps: int, shifts: tuple[slice, ...]):
    """Extract the windows of a spatial axis into a new axis at position `taps`."""
    return jnp.stack([x[_along(axis, shift)] for shift in shifts], axis=taps)


def _fold(x: jax.Array, axis: int, taps: int, shifts: tuple[slice, ...], size: int):
    """The transpose of `_unfold`: sum the windows back onto their spatial axis."""
    shape = list(x.shape)
    shape[axis] = size
    del shape[taps]
    out = jnp.zeros(shape, x.dtype)
    for tap, shift in enumerate(shifts):
        part = lax.index_in_dim(x, tap, axis=taps, keepdims=False)
        out = out.at[_along(axis, shift)].add(part)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _patch_conv(geometry, accumulator, x, kernel):
    """The convolution of padded images as a patch product."""
    return _patch_conv_fwd(geometry, accumulator, x, kernel)[0]


def _patch_conv_fwd(geometry, accumulator, x, kernel):
    patches, taps = x, x.ndim - 1
    # Last axis first, so that the first axis's window is outermost, as in the kernel.
    for axis, shifts in reversed(list(enumerate(geometry.shifts, start=1))):
        patches = _unfold(patches, axis, taps, shifts)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    patches = patches.reshape(*patches.shape[:taps], len(matrix))
    y = jnp.matmul(patches, matrix, preferred_element_type=accumulator)
    return y, (patches, kernel, x)


def _patch_conv_bwd(geometry, accumulator, residuals, g):
    patches, kernel, x = residuals
    taps, channels_out = x.ndim - 1, kernel.shape[-1]
    g = g.astype(kernel.dtype)
    d_kernel = patches.reshape(-1, patches.shape[-1]).T @ g.reshape(-1, channels_out)
    d_x = g @ kernel.reshape(-1, channels_out).T
    d_x = d_x.reshape(*d_x.shape[:-1], *kernel.shape[:-1])
    for axis, shifts in enumerate(geometry.shifts, start=1):
        d_x = _fold(d_x, axis, taps, shifts, x.shape[axis])
    return d_x, d_kernel.reshape(kernel.shape)


_patch_conv.defvjp(_patch_conv_fwd, _patch_conv_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped_conv(geometry, groups, accumulator, x, kernel):
    """XLA's grouped convolution, with the kernel's gradient as products of the taps.

    XLA's own gradient is wrong on a mesh of two axes if only one of them shards the
    batch: it adds each replica's sum. On a CPU it is also slow.
    """
    options = {"groups": groups, "accumulator": accumulator, **geometry.options}
    return xla_conv(x, kernel, **options)


def _grouped_conv_fwd(geometry, groups, accumulator, x, kernel):
    return _grouped_conv(geometry, groups, accumulator, x, kernel), (x, kernel)


def _grouped_conv_bwd(geometry, groups, accumulator, residuals, g):
    x, kernel = residuals
    g = g.astype(kernel.dtype)
    of_images = partial(xla_conv, groups=groups, **geometry.options)
    (d_x,) = jax.vjp(lambda x: of_images(x, kernel), x)[1](g)

    def grouped(a):
        return a.reshape(*a.shape[:-1], groups, -1)

    padded = grouped(jnp.pad(x, ((0, 0), *geometry.padding, (0, 0))))
    g = grouped(g)
    d_taps = [
        jnp.einsum("...gc,...go->cgo", padded[(slice(None), *tap)], g)
        for tap in product(*geometry.shifts)
    ]
    return d_x, jnp.stack(d_taps).reshape(kernel.shape)


_grouped_conv.defvjp(_grouped_conv_fwd, _grouped_conv_bwd)
