"""Stages that pool: signs, sums and floats."""

from dataclasses import dataclass
from typing import Any

import jax

from xnor_jax import layers, ops
from xnor_jax.deploy.stage import Spec, Stage, check, static
from xnor_jax.geometry import Pads, pool_geometry
from xnor_jax.ops import Bits, Threshold


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool(Stage):
    window: tuple[int, ...] = static(())
    strides: tuple[int, ...] = static(())
    padding: Pads = static(())

    @property
    def geometry(self) -> dict[str, Any]:
        """Window, strides and padding."""
        return {
            "window": self.window,
            "strides": self.strides,
            "padding": self.padding,
        }

    def out(self, spec: Spec) -> Spec:
        *spatial, channels = spec.shape
        geometry = pool_geometry(self.kind, spatial, **self.geometry)
        return Spec((*geometry.out, channels), spec.bits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class BitsPool(_Pool):
    """The sign of a max-pool, from the signs of what it pools.

    Attributes:
      flip: uint32 words `[ceil(C / 32)]`; see `xnor_jax.ops.pool_bits`.
    """

    kind = "max_pool_bits"
    flip: jax.Array

    def out(self, spec: Spec) -> Spec:
        """Bits of other positions."""
        check(spec, bits=True)
        return super().out(spec)

    def __call__(self, x: Bits, backend: str) -> Bits:
        """Map bits `[N, *spatial, C]` to bits `[N, *out, C]`."""
        return ops.pool_bits(x, self.flip, **self.geometry)

    def step(self, *, exact: bool) -> ops.steps.Step | None:
        """At most two spatial axes."""
        if len(self.window) > 2:
            return None
        return ops.steps.pool_bits(self.flip, **self.geometry)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class SumPool(_Pool):
    """The bits of each window's sum: what follows an average-pool, as a threshold.

    Attributes:
      threshold: A float32 `Threshold` on the sums.
    """

    kind = "sum_pool_bits"
    threshold: Threshold

    def out(self, spec: Spec) -> Spec:
        """Bits of other positions."""
        check(spec, bits=False)
        if len(spec.shape) != 3:
            raise ValueError(f"expected 2 spatial axes, got shape {spec.shape}")
        return super().out(spec)._replace(bits=True)

    def __call__(self, x: jax.Array, backend: str) -> Bits:
        """Map float32 `[N, H, W, C]` to bits `[N, *out, C]`."""
        return ops.sum_pool_bits(x, self.threshold, **self.geometry, backend=backend)

    def step(self, *, exact: bool) -> ops.steps.Step:
        """Exact: its sums have the one order of additions."""
        return ops.steps.sum_pool_bits(self.threshold, **self.geometry)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class FloatPool(_Pool):
    """The maximum or the mean of each window, as floats."""

    kind = "pool"
    mean: bool = static(False)

    def out(self, spec: Spec) -> Spec:
        """Floats of other positions."""
        check(spec, bits=False)
        return super().out(spec)

    def __call__(self, x: jax.Array, backend: str) -> jax.Array:
        """Map float32 `[N, *spatial, C]` to `[N, *out, C]`."""
        pool = layers.AvgPool if self.mean else layers.MaxPool
        return pool(**self.geometry)(x)
