"""Float products and pools, each in the formulation that the platform runs fast.

This is the one place that decides; `experiments/benchmarks/formulations.py` measures
the choices. All formulations agree to rounding, in values and in gradients.
"""

from collections.abc import Sequence
from functools import partial, reduce
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = Literal["SAME", "VALID"] | int | Sequence[int | tuple[int, int]]
Pads = tuple[tuple[int, int], ...]

# Above this many weights a filter, XLA's CPU convolution beats the patch product.
_LARGEST_PATCH = 512


def explicit_padding(
    padding: Padding,
    spatial: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
) -> Pads:
    """The zeros before and after each spatial axis.

    Args:
      padding: `"SAME"`, `"VALID"`, one number for all sides, or per axis a number or a
        pair (before, after).
      spatial: The input's spatial sizes.
      window: The kernel's spatial sizes.
      strides: One stride per spatial axis.
      dilation: One kernel dilation per spatial axis.

    Raises:
      ValueError: If the padding is another word, or has not one entry per axis.
    """
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"padding: expected 'SAME', 'VALID', a number or one (before, after) "
                f"per axis, got {padding!r}"
            )
        pads = lax.padtype_to_pads(spatial, reach, strides, padding)
        return tuple((int(before), int(after)) for before, after in pads)
    if isinstance(padding, int | np.integer):
        return ((int(padding), int(padding)),) * len(window)
    if len(padding) != len(window):
        raise ValueError(
            f"padding: expected {len(window)} entries, one per spatial axis, got "
            f"{padding}"
        )
    pairs = [(p, p) if isinstance(p, int | np.integer) else tuple(p) for p in padding]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"padding: expected per axis a number or (before, after), got {padding}"
        )
    return tuple((int(before), int(after)) for before, after in pairs)


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
    """A convolution of rank 1 to 3, channels last.

    Differentiable in reverse mode only: the patch product carries its own gradient.

    Args:
      x: Images, `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`, in the dtype of `x`.
      strides: One per spatial axis.
      padding: Zeros (before, after) each spatial axis.
      dilation: One per spatial axis, of the kernel.
      groups: How many groups the channels fall into.
      accumulator: The dtype of the sums and of the result; None for that of `x`.

    Returns:
      `[N, *out, C_out]`.
    """
    window, unit = kernel.shape[:-2], (1,) * (kernel.ndim - 2)
    xla = partial(
        xla_conv,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        accumulator=accumulator,
    )
    if groups > 1:
        return xla(x, kernel)

    def pointwise(x, kernel):
        pixels = x[(slice(None), *(slice(None, None, s) for s in strides))]
        matrix = kernel.reshape(kernel.shape[-2:])
        return jnp.matmul(pixels, matrix, preferred_element_type=accumulator)

    if window == unit and not any(map(any, padding)):
        if strides == unit:
            return pointwise(x, kernel)
        # XLA's GPU compiler draws the strides into the product: JAX 0.10's fails at it.
        return lax.platform_dependent(x, kernel, cpu=pointwise, default=xla)
    if prod(kernel.shape[:-1]) > _LARGEST_PATCH:
        return xla(x, kernel)

    def patches(x, kernel):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return _patch_conv(strides, dilation, accumulator, x, kernel)

    return lax.platform_dependent(x, kernel, cpu=patches, default=xla)


def dot(x: jax.Array, kernel: jax.Array, *, accumulator: Any = None) -> jax.Array:
    """A dense product: `x @ kernel`, `[..., C_in] × [C_in, C_out]`."""
    return jnp.matmul(x, kernel, preferred_element_type=accumulator)


def max_pool(
    x: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Pads | None = None,
) -> jax.Array:
    """The largest value of each window, as a maximum of shifted slices.

    On a CPU its gradient is 3 to 5 times quicker than `reduce_window`'s. Where several
    values of a window are the largest they share the gradient.

    Args:
      x: `[N, *spatial, C]`, floating.
      window: The window's sizes, one per spatial axis.
      strides: One per spatial axis.
      padding: How far (before, after) each axis windows may hang over; None for not.

    Returns:
      `[N, *out, C]`.
    """
    if padding is not None:
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-jnp.inf)
    for axis, (size, stride) in enumerate(zip(window, strides, strict=True), start=1):
        shifts = _shifts(x.shape[axis], size, stride, 1)
        x = reduce(jnp.maximum, [x[_along(axis, shift)] for shift in shifts])
    return x


def sum_pool(
    x: jax.Array, window: tuple[int, ...], strides: tuple[int, ...], padding: Pads
) -> jax.Array:
    """The sum of each window, taken row by row; outside the image are zeros.

    Args:
      x: `[N, *spatial, C]`, floating.
      window: The window's sizes, one per spatial axis.
      strides: One per spatial axis.
      padding: Zeros (before, after) each spatial axis.

    Returns:
      `[N, *out, C]`.
    """
    return lax.reduce_window(
        x,
        np.zeros((), x.dtype),
        lax.add,
        (1, *window, 1),
        (1, *strides, 1),
        ((0, 0), *padding, (0, 0)),
    )


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
    """`conv` as XLA's own convolution, on every platform and for every shape."""
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


def _shifts(size: int, window: int, stride: int, dilation: int) -> list[slice]:
    """For each position in the window, the slice of an axis that it meets."""
    out = (size - (window - 1) * dilation - 1) // stride + 1
    if out < 1:
        return [slice(0, 0)] * window
    return [
        slice(t * dilation, t * dilation + (out - 1) * stride + 1, stride)
        for t in range(window)
    ]


def _along(axis: int, index: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, index)


def _unfold(x: jax.Array, axis: int, taps: int, shifts: list[slice]) -> jax.Array:
    """Give the window of a spatial axis an axis of its own, at position `taps`."""
    return jnp.stack([x[_along(axis, shift)] for shift in shifts], axis=taps)


def _fold(x: jax.Array, axis: int, taps: int, shifts: list[slice], size: int):
    """The transpose of `_unfold`: sum the window back onto its spatial axis."""
    shape = list(x.shape)
    shape[axis] = size
    del shape[taps]
    out = jnp.zeros(shape, x.dtype)
    for tap, shift in enumerate(shifts):
        part = lax.index_in_dim(x, tap, axis=taps, keepdims=False)
        out = out.at[_along(axis, shift)].add(part)
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _patch_conv(strides, dilation, accumulator, x, kernel):
    return _patch_conv_fwd(strides, dilation, accumulator, x, kernel)[0]


def _all_shifts(strides, dilation, x, kernel):
    geometry = zip(x.shape[1:-1], kernel.shape[:-2], strides, dilation, strict=True)
    return [_shifts(*axis) for axis in geometry]


def _patch_conv_fwd(strides, dilation, accumulator, x, kernel):
    patches, taps = x, x.ndim - 1
    # The last axis first: the first axis's window comes outermost, as in the kernel.
    axes = enumerate(_all_shifts(strides, dilation, x, kernel), start=1)
    for axis, shifts in reversed(list(axes)):
        patches = _unfold(patches, axis, taps, shifts)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    patches = patches.reshape(*patches.shape[:taps], len(matrix))
    y = jnp.matmul(patches, matrix, preferred_element_type=accumulator)
    return y, (patches, kernel, x)


def _patch_conv_bwd(strides, dilation, accumulator, residuals, g):
    patches, kernel, x = residuals
    taps, channels_out = x.ndim - 1, kernel.shape[-1]
    g = g.astype(kernel.dtype)
    d_kernel = patches.reshape(-1, patches.shape[-1]).T @ g.reshape(-1, channels_out)
    d_x = g @ kernel.reshape(-1, channels_out).T
    d_x = d_x.reshape(*d_x.shape[:-1], *kernel.shape[:-1])
    for axis, shifts in enumerate(_all_shifts(strides, dilation, x, kernel), start=1):
        d_x = _fold(d_x, axis, taps, shifts, x.shape[axis])
    return d_x, d_kernel.reshape(kernel.shape)


_patch_conv.defvjp(_patch_conv_fwd, _patch_conv_bwd)
