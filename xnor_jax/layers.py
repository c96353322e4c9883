"""Networks that run their layers in order, and the layers that have no parameters.

`xnor_jax.pack` can read such a network, because the order of execution stands in one
place: what `layers()` lists is what runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from xnor_jax.convolution import max_pool, mean_pool
from xnor_jax.geometry import (
    Geometry,
    Padding,
    check_padding,
    per_axis,
    pool_geometry,
)
from xnor_jax.ops import norm as ops_norm
from xnor_jax.ops.training import conv, conv_general_dilated


class Layered(nnx.Module):
    """A network whose layers run one after another.

    A subclass sets `image_shape`, says in `layers()` what runs, and leaves `__call__`
    alone. Then `xnor_jax.pack` reads it; what it knows are `XnorBlock`, `BinaryConv`,
    `BinaryLinear`, `nnx.Conv`, `nnx.Linear`, `nnx.BatchNorm`, `nnx.Dropout`,
    `nnx.relu`, `sign_ste`, the layers of this module, and networks of these. A plain
    `nnx.Sequential` of them can be packed as well.

    Attributes:
      image_shape: The input's shape without the batch, such as (height, width,
        channels).
      backend: What computes the sums of BatchNorms that stand by themselves, in
        training; see `xnor_jax.nn.BinaryConv`. With `"auto"` on a CPU a training step
        holds calls of the compiled library, which `jax.export` does not take.

    Examples:
      >>> import jax, xnor_jax as xnor
      >>> from flax import nnx
      >>> class Net(xnor.nn.Layered):
      ...     def __init__(self, rngs):
      ...         self.image_shape = (8, 8, 3)
      ...         self.conv1 = nnx.Conv(3, 32, (3, 3), rngs=rngs)
      ...         self.block2 = xnor.nn.XnorBlock(32, 64, (3, 3), rngs=rngs)
      ...         self.dense3 = nnx.Linear(64, 10, rngs=rngs)
      ...
      ...     def layers(self):
      ...         pool = xnor.nn.MaxPool(2, 2)
      ...         mean = xnor.nn.GlobalAveragePool()
      ...         return self.conv1, nnx.relu, pool, self.block2, mean, self.dense3
      >>> Net(nnx.Rngs(0))(jax.numpy.ones((5, 8, 8, 3))).shape
      (5, 10)
    """

    image_shape: tuple[int, ...]
    backend: str = "auto"

    def layers(self) -> Sequence[Callable[[jax.Array], jax.Array]]:
        """What runs, in this order: modules and functions of one array."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method layers()")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[N, *image_shape]` to logits `[N, classes]`."""
        names = {id(value): name for name, value in vars(self).items()}
        for layer in self.layers():
            # So that a profile of the compiled program tells the layers apart.
            with jax.named_scope(names.get(id(layer)) or _name(layer)):
                if isinstance(layer, nnx.BatchNorm):
                    x = batch_norm(layer, x, self.backend)
                elif isinstance(layer, nnx.Conv):
                    x = real_conv(layer, x)
                else:
                    x = layer(x)
        return x


def batch_norm(norm: nnx.BatchNorm, x: jax.Array, backend: str = "auto") -> jax.Array:
    """`norm(x)`, to rounding; in training by `xnor_jax.ops.norm`.

    Args:
      norm: The layer. What Flax alone knows, such as statistics over a named axis or
        in another dtype, Flax computes.
      x: `[N, ..., C]`.
      backend: What computes the sums; see `xnor_jax.ops.norm.batch_norm`.
    """
    scale = None if norm.scale is None else norm.scale[...]
    bias = None if norm.bias is None else norm.bias[...]
    if not (
        type(norm) is nnx.BatchNorm
        and norm.use_running_average is False
        and norm.use_fast_variance
        and norm.axis_name is None
        and norm.axis == -1
        and norm.dtype in (None, jnp.float32)
        and norm.promote_dtype is promote_dtype
        and all(a is None or a.dtype == jnp.float32 for a in (x, scale, bias))
        and x.ndim >= 2
        and x.shape[-1:] == norm.mean.shape
    ):
        return norm(x)
    y, mean, variance = ops_norm.batch_norm(
        x, scale, bias, epsilon=norm.epsilon, backend=backend
    )
    momentum = float(norm.momentum)
    for average, now in ((norm.mean, mean), (norm.var, variance)):
        average[...] = momentum * average[...] + (1 - momentum) * now
    return y


def real_conv(layer: nnx.Conv, x: jax.Array) -> jax.Array:
    """`layer(x)`; where its product is `xnor_jax.ops.training`'s, with its bias.

    Args:
      layer: The layer. What Flax alone knows, such as a mask or another dtype, Flax
        computes.
      x: `[N, *spatial, C]`.
    """
    product, rank = layer.conv_general_dilated, len(layer.kernel_size)
    function = product.func if isinstance(product, partial) else product
    options = product.keywords if isinstance(product, partial) else {}
    if not (
        type(layer) is nnx.Conv
        and function is conv_general_dilated
        and options.keys() <= {"backend"}
        and layer.bias is not None
        and layer.precision is None
        and layer.mask is None
        and layer.preferred_element_type is None
        and layer.input_dilation in (None, 1)
        and layer.padding not in ("CAUSAL", "CIRCULAR", "REFLECT")
        and layer.dtype in (None, jnp.float32)
        and layer.promote_dtype is promote_dtype
        and x.dtype == layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32
        and x.ndim == rank + 2
        and x.shape[-1] == layer.in_features
    ):
        return layer(x)
    padding: Any = layer.padding
    return conv(
        x,
        layer.kernel[...],
        layer.bias[...],
        strides=1 if layer.strides is None else layer.strides,
        padding=padding,
        dilation=1 if layer.kernel_dilation is None else layer.kernel_dilation,
        groups=layer.feature_group_count,
        **options,
    )


def _name(layer: Callable[..., jax.Array]) -> str:
    return getattr(layer, "__name__", type(layer).__name__)


@dataclass(frozen=True)
class _Pool:
    window: int | tuple[int, ...]
    strides: int | tuple[int, ...]
    padding: Padding = "VALID"

    def __post_init__(self):
        # Hashable, as a static attribute of a module has to be.
        name = type(self).__name__
        for field in ("window", "strides"):
            value: Any = getattr(self, field)
            several = isinstance(value, Sequence | np.ndarray)
            rank = max(1, len(value)) if several else 1
            sizes = per_axis(name, field, value, rank)
            object.__setattr__(self, field, sizes if several else sizes[0])
        object.__setattr__(self, "padding", check_padding(name, self.padding))

    def geometry(self, spatial: Sequence[int]) -> Geometry:
        """The windows on an image of these spatial sizes.

        Raises:
          ValueError: If the pool is for another number of axes, the window does not fit
            into the padded image, or is no larger than its padding.
        """
        return pool_geometry(
            type(self).__name__,
            spatial,
            self.window,
            strides=self.strides,
            padding=self.padding,
        )


@dataclass(frozen=True)
class MaxPool(_Pool):
    """The largest value of each window; what lies outside the image is left out.

    Args:
      window: One number, or one per spatial axis.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after):
        how far windows may hang over, less than the window.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, *out, C]`."""
        return max_pool(x, self.geometry(x.shape[1:-1]))


@dataclass(frozen=True)
class AvgPool(_Pool):
    """The mean of each window, where what lies outside the image counts as zeros.

    Args:
      window: One number, or one per spatial axis.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after):
        how far windows may hang over, less than the window.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, *out, C]`."""
        return mean_pool(x, self.geometry(x.shape[1:-1]))


@dataclass(frozen=True)
class GlobalAveragePool:
    """The mean over all positions of an image."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, C]`."""
        spatial = x.shape[1:-1]
        whole = pool_geometry(
            "GlobalAveragePool", spatial, spatial, strides=1, padding="VALID"
        )
        return mean_pool(x, whole).reshape(x.shape[0], x.shape[-1])


@dataclass(frozen=True)
class Flatten:
    """Everything but the batch on one axis, channels innermost."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, ...]` to `[N, features]`."""
        return x.reshape(x.shape[0], prod(x.shape[1:]))
