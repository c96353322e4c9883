"""All that a packed network can consist of; here what neither multiplies nor pools."""

from dataclasses import dataclass
from math import prod

import jax

from xnor_jax import layers, ops
from xnor_jax.deploy.pools import BitsPool, FloatPool, SumPool
from xnor_jax.deploy.products import PackedConv, RealConv, ScaledConv
from xnor_jax.deploy.stage import Spec, Stage, Value, check
from xnor_jax.ops import Bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Norm(Stage):
    """BatchNorm of evaluation, `(x − mean) · scale + bias`, as floats.

    Attributes:
      mean: float32 `[C]`.
      scale: float32 `[C]`, `γ / √(var + ε)`.
      bias: float32 `[C]`.
    """

    kind = "norm"
    mean: jax.Array
    scale: jax.Array
    bias: jax.Array

    def out(self, spec: Spec) -> Spec:
        """Floats of the same shape."""
        check(spec, bits=False)
        if spec.shape[-1:] != tuple(self.mean.shape):
            raise ValueError(
                f"expected {self.mean.shape[0]} channels, got {spec.shape[-1]}"
            )
        return spec

    def __call__(self, x: jax.Array, backend: str) -> jax.Array:
        """Map float32 `[..., C]` to the same shape."""
        return (x - self.mean) * self.scale + self.bias

    def step(self, *, exact: bool) -> ops.steps.Step | None:
        """Only where no sign follows."""
        return None if exact else ops.steps.norm(self.mean, self.scale, self.bias)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Relu(Stage):
    """`max(0, ·)` of floats."""

    kind = "relu"

    def out(self, spec: Spec) -> Spec:
        """Floats of the same shape."""
        return check(spec, bits=False)

    def __call__(self, x: jax.Array, backend: str) -> jax.Array:
        """Map floats to the same shape."""
        return jax.nn.relu(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Sign(Stage):
    """The signs of floats as bits."""

    kind = "sign"

    def out(self, spec: Spec) -> Spec:
        """Bits of the same shape."""
        return check(spec, bits=False)._replace(bits=True)

    def __call__(self, x: jax.Array, backend: str) -> Bits:
        """Map floats to bits of the same shape."""
        return ops.sign_bits(x, backend=backend)

    def step(self, *, exact: bool) -> ops.steps.Step:
        """Number by number."""
        return ops.steps.pack()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Mean(Stage):
    """The mean over all positions of an image, as floats."""

    kind = "mean"

    def out(self, spec: Spec) -> Spec:
        """Floats, the channels alone."""
        return Spec(check(spec, bits=False).shape[-1:])

    def __call__(self, x: jax.Array, backend: str) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, C]`."""
        return layers.GlobalAveragePool()(x)

    def step(self, *, exact: bool) -> ops.steps.Step | None:
        """Only where no sign follows."""
        return None if exact else ops.steps.mean()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Flatten(Stage):
    """Everything but the batch on one axis; bits only of a single position."""

    kind = "flatten"

    def out(self, spec: Spec) -> Spec:
        """The same numbers on one axis."""
        if spec.bits and prod(spec.shape[:-1]) != 1:
            raise ValueError(f"expected bits of one position, got shape {spec.shape}")
        return Spec((prod(spec.shape),), spec.bits)

    def __call__(self, x: Value, backend: str) -> Value:
        """Map `[N, *spatial, C]` to `[N, features]`."""
        if isinstance(x, Bits):
            return Bits(layers.Flatten()(x.words), x.size)
        return layers.Flatten()(x)

    def step(self, *, exact: bool) -> ops.steps.Step:
        """The same numbers."""
        return ops.steps.flatten()


STAGES: dict[str, type[Stage]] = {
    stage.kind: stage
    for stage in (
        *(RealConv, PackedConv, ScaledConv),
        *(BitsPool, SumPool, FloatPool),
        *(Norm, Relu, Sign, Mean, Flatten),
    )
}
