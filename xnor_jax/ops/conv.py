"""Convolutions of signs: floats in, integers out."""

from collections.abc import Sequence
from functools import partial

import jax
from jax.typing import ArrayLike

from xnor_jax._kernel import check_kernel
from xnor_jax.geometry import Geometry, Padding, conv_geometry, positive
from xnor_jax.ops import _inference, backends
from xnor_jax.ops._mesh import over_images


def binary_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    strides: int | Sequence[int],
    padding: Padding,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    backend: str = "auto",
) -> jax.Array:
    """The convolution of signs, `sign(x) ⊛ sign(kernel)`, with 1 to 3 spatial axes.

    Taps outside the image add 0. All backends give identical results.

    Args:
      x: Images `[N, *spatial, C]`, floating; their signs are taken, `sign(±0) = +1`.
      kernel: `[*window, C / groups, C_out]`, floating; its signs are taken.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      groups: The number of channel groups.
      dilation: The kernel's dilation; one number, or one per spatial axis.
      backend: `"auto"`, or one of `available_backends()`.

    Returns:
      int32 sums `[N, *out, C_out]`.

    Raises:
      ValueError: If shapes, channels, groups or the geometry do not fit, or the backend
        is unknown or does not support the rank.
      TypeError: If an argument is not floating point, or when differentiated: integers
        have no gradient.
      RuntimeError: If the backend is not available.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> x = jnp.array([1.0, -1.0, -1.0, 1.0]).reshape(1, 4, 1)
      >>> kernel = jnp.array([1.0, -1.0]).reshape(2, 1, 1)
      >>> xnor.ops.binary_conv(x, kernel, strides=1, padding="VALID").ravel()
      Array([ 2,  0, -2], dtype=int32)
    """
    x = _inference.check_floating("binary_conv", "x", x)
    kernel = _inference.check_floating("binary_conv", "kernel", kernel)
    groups = check_channels("binary_conv", x, kernel, groups)
    geometry = conv_geometry(
        "binary_conv",
        x.shape[1:-1],
        kernel.shape[:-2],
        strides=strides,
        padding=padding,
        dilation=dilation,
    )
    backend = backends.resolve("binary_conv", backend, len(geometry.window))
    return _binary_conv(x, kernel, geometry=geometry, groups=groups, backend=backend)


def check_channels(where: str, x: jax.Array, kernel: jax.Array, groups: int) -> int:
    """Check that the shapes of images and a kernel fit together.

    Args:
      where: The public function's name, for errors.
      x: Images `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`.
      groups: The number of channel groups.

    Returns:
      `groups` as an int.

    Raises:
      ValueError: If the ranks differ or are not 1 to 3, or the channels do not fit.
    """
    groups = positive(where, "groups", groups)
    try:
        check_kernel(kernel)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    rank = kernel.ndim - 2
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{where}: expected a kernel [*window, C_in, C_out] of 1 to 3 spatial "
            f"axes, got shape {kernel.shape}"
        )
    if x.ndim != kernel.ndim:
        raise ValueError(
            f"{where}: expected images [N, *spatial, C] of {rank} spatial axes for the "
            f"kernel of shape {kernel.shape}, got {x.shape}"
        )
    if x.shape[-1] % groups or kernel.shape[-1] % groups:
        raise ValueError(
            f"{where}: expected channels that divide into the groups, got "
            f"{x.shape[-1]} in, {kernel.shape[-1]} out and {groups} groups"
        )
    if x.shape[-1] // groups != kernel.shape[-2]:
        raise ValueError(
            f"{where}: expected a kernel of {x.shape[-1] // groups} input channels "
            f"(images of {x.shape[-1]}, groups {groups}), got {kernel.shape[-2]}"
        )
    return groups


@over_images
@partial(jax.jit, static_argnames=("geometry", "groups", "backend"))
def _binary_conv(x, kernel, *, geometry: Geometry, groups: int, backend: str):
    x, kernel = _inference.no_gradient("binary_conv", (x, kernel))
    return backends.product("binary_conv", backend, x, kernel, geometry, groups)
