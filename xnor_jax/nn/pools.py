"""Pooling and flattening: layers without parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np

from xnor_jax.convolution import max_pool, mean_pool
from xnor_jax.geometry import (
    Geometry,
    Padding,
    check_padding,
    per_axis,
    pool_geometry,
)


@dataclass(frozen=True)
class _Pool:
    window: int | tuple[int, ...]
    strides: int | tuple[int, ...]
    padding: Padding = "VALID"

    def __post_init__(self):
        # A static attribute of a module has to be hashable.
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
          ValueError: If the pool has another number of axes, or the window does not fit
            into the padded image or is not larger than the padding.
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
    """Max-pooling: the largest value of each window, ignoring the padding.

    Args:
      window: One number, or one per spatial axis.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after);
        smaller than the window.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, *out, C]`."""
        return max_pool(x, self.geometry(x.shape[1:-1]))


@dataclass(frozen=True)
class AvgPool(_Pool):
    """Average-pooling: the mean of each window, counting the padding as zeros.

    Args:
      window: One number, or one per spatial axis.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after);
        smaller than the window.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, *out, C]`."""
        return mean_pool(x, self.geometry(x.shape[1:-1]))


@dataclass(frozen=True)
class GlobalAveragePool:
    """The mean over all spatial positions."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, C]`."""
        spatial = x.shape[1:-1]
        whole = pool_geometry(
            "GlobalAveragePool", spatial, spatial, strides=1, padding="VALID"
        )
        return mean_pool(x, whole).reshape(x.shape[0], x.shape[-1])


@dataclass(frozen=True)
class Flatten:
    """Flatten all axes except the batch into one, channels innermost."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, ...]` to `[N, features]`."""
        return x.reshape(x.shape[0], prod(x.shape[1:]))
