"""What a packed network runs: one stage after another, on floats or on bits.

A stage holds its arrays as pytree leaves and everything else as static fields. It knows
the shape of what it gives for the shape of what it gets, so that a network is checked
before it is built, and never holds how bits are laid out: that is `xnor_jax.ops`'.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from xnor_jax import convolution, layers, ops
from xnor_jax.convolution import Pads
from xnor_jax.ops import Affine, Bits, Epilogue, PackedKernel, Threshold

Value = jax.Array | Bits


class Spec(NamedTuple):
    """What flows between two stages, for one image."""

    shape: tuple[int, ...]  # channels last, without the batch
    bits: bool = False  # packed signs, or float32


def static(default: Any = None) -> Any:
    """A field of the pytree's structure, not a leaf."""
    return field(default=default, metadata={"static": True})


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One step of a packed network.

    Attributes:
      name: The layer's path in the model, such as `block2/layer`.
      parameters: How many parameters of the float model went into this stage.
    """

    kind: ClassVar[str]
    name: str = static("")
    parameters: int = static(0)

    def out(self, spec: Spec) -> Spec:
        """What the stage gives for what it gets.

        Raises:
          ValueError: If it cannot take that.
        """
        raise NotImplementedError

    def __call__(self, x: Any, backend: str) -> Any:
        """Map a batch of what `out` takes to a batch of what it gives."""
        raise NotImplementedError

    def step(self) -> ops.steps.Step | None:
        """The same for the compiled backend, if it can run it among others."""
        return None

    @property
    def rounds(self) -> bool:
        """Whether `step` rounds in an order of its own: not for what becomes a sign."""
        return False

    @property
    def weights(self) -> int:
        """How many weights of a kernel the stage holds."""
        return 0

    def macs(self, spec: Spec) -> int:
        """Multiplications and additions for one image."""
        return 0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Conv(Stage):
    strides: tuple[int, ...] = static(())
    padding: Pads = static(())
    dilation: tuple[int, ...] = static(())
    groups: int = static(1)

    # Of the kernel, [*window, C_in / groups, C_out].
    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def weights(self) -> int:
        return prod(self.shape)

    def macs(self, spec: Spec) -> int:
        return prod(self.out(spec).shape[:-1]) * self.weights

    def out(self, spec: Spec) -> Spec:
        *window, each, features = self.shape
        if spec.shape[-1] != each * self.groups:
            raise ValueError(
                f"expected {each * self.groups} channels, got {spec.shape[-1]}"
            )
        if not window:
            return Spec((*spec.shape[:-1], features), self._to_bits())
        spatial = windows(
            spec.shape[:-1], window, self.strides, self.padding, self.dilation
        )
        return Spec((*spatial, features), self._to_bits())

    def _to_bits(self) -> bool:
        return isinstance(getattr(self, "epilogue", None), Threshold)

    @property
    def _geometry(self) -> dict[str, Any]:
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation": self.dilation,
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class RealConv(_Conv):
    """A convolution or dense layer of real numbers: the first, the last.

    Attributes:
      kernel: float32 `[*window, C_in / groups, C_out]`; dense without a window.
      epilogue: `Affine`, or a float32 `Threshold`.
    """

    kind = "real"
    kernel: jax.Array
    epilogue: Affine | Threshold

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        return tuple(self.kernel.shape)

    def out(self, spec: Spec) -> Spec:
        """Floats of other channels and, of a convolution, other positions."""
        check(spec, bits=False)
        return super().out(spec)

    def __call__(self, x: jax.Array, backend: str) -> Value:
        """Map float32 `[N, *spatial, C]` to floats or bits."""
        if self.kernel.ndim > 2:
            if self.kernel.ndim != 4 or self.groups > 1:
                backend = "xla"  # Only there; the numbers are the same to rounding.
            return ops.real_conv(
                x,
                self.kernel,
                self.epilogue,
                **self._geometry,
                groups=self.groups,
                backend=backend,
            )
        y = ops.apply_epilogue(convolution.dot(x, self.kernel), self.epilogue)
        return Bits(y, self.shape[-1]) if self._to_bits() else y

    @property
    def rounds(self) -> bool:
        """Of a dense layer; a convolution is worth the few signs, 1 image in 10,000."""
        return self.kernel.ndim == 2

    def step(self) -> ops.steps.Step | None:
        """One group, at most two spatial axes."""
        if self.groups > 1 or self.kernel.ndim > 4:
            return None
        return ops.steps.real_conv(self.kernel, self.epilogue, **self._geometry)


class _OnBits(_Conv):
    kernel: PackedKernel

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's."""
        kernel = self.kernel
        return (*kernel.window, kernel.in_features, kernel.out_features)

    def product(self, x: Bits, epilogue: Epilogue, backend: str) -> Any:
        """What becomes of the sums of signs."""
        if not self.kernel.window:
            return ops.packed_matmul(x, self.kernel, epilogue, backend=backend)
        return ops.packed_conv(
            x,
            self.kernel,
            epilogue,
            **self._geometry,
            groups=self.groups,
            backend=backend,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class PackedConv(_OnBits):
    """A convolution or dense layer of signs.

    Attributes:
      kernel: The signs of `[*window, C_in / groups, C_out]`; dense without a window.
      epilogue: `Affine`, or an int32 `Threshold`.
    """

    kind = "binary"
    kernel: PackedKernel
    epilogue: Affine | Threshold

    def out(self, spec: Spec) -> Spec:
        """Floats or bits of other channels and, of a convolution, other positions."""
        check(spec, bits=True)
        return super().out(spec)

    def __call__(self, x: Bits, backend: str) -> Value:
        """Map bits `[N, *spatial, C]` to floats or bits."""
        return self.product(x, self.epilogue, backend)

    def step(self) -> ops.steps.Step | None:
        """Groups of whole words, at most two spatial axes."""
        if len(self.kernel.window) > 2 or not self.kernel.whole_words:
            return None
        return ops.steps.conv(self.kernel, self.epilogue, **self._geometry)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledConv(_OnBits):
    """A convolution or dense layer of signs times the paper's `K`: needs its floats.

    `K` depends on the image, so nothing after it folds into a threshold.

    Attributes:
      kernel: The signs of `[*window, C_in / groups, C_out]`; dense without a window.
      scale: α, float32 `[C_out]`.
      bias: float32 `[C_out]`.
    """

    kind = "scaled"
    kernel: PackedKernel
    scale: jax.Array
    bias: jax.Array

    def out(self, spec: Spec) -> Spec:
        """Floats of other channels and, of a convolution, other positions."""
        check(spec, bits=False)
        return super().out(spec)

    def __call__(self, x: jax.Array, backend: str) -> jax.Array:
        """Map float32 `[N, *spatial, C]` to `K · α · (sign(x) ⊛ sign(w)) + bias`."""
        scaled = Affine(self.scale, jnp.zeros_like(self.scale))
        y = self.product(ops.sign_bits(x, backend=backend), scaled, backend)
        mean = jnp.mean(jnp.abs(x), axis=-1, keepdims=True)
        if window := self.kernel.window:
            box = jnp.full((*window, 1, 1), 1 / prod(window), x.dtype)
            mean = convolution.conv(mean, box, **self._geometry)
        return y * mean + self.bias


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool(Stage):
    window: tuple[int, ...] = static(())
    strides: tuple[int, ...] = static(())
    padding: Pads = static(())

    def out(self, spec: Spec) -> Spec:
        *spatial, channels = spec.shape
        layers.MaxPool(**pool_geometry(self)).geometry(spatial)
        unit = (1,) * len(self.window)
        out = windows(tuple(spatial), self.window, self.strides, self.padding, unit)
        return Spec((*out, channels), spec.bits)


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
        return ops.pool_bits(x, self.flip, **pool_geometry(self))

    def step(self) -> ops.steps.Step | None:
        """At most two spatial axes."""
        if len(self.window) > 2:
            return None
        return ops.steps.pool_bits(self.flip, **pool_geometry(self))


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
        return ops.sum_pool_bits(
            x, self.threshold, **pool_geometry(self), backend=backend
        )

    def step(self) -> ops.steps.Step:
        """Of two spatial axes, as it always has."""
        return ops.steps.sum_pool_bits(self.threshold, **pool_geometry(self))


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
        return pool(**pool_geometry(self))(x)


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

    @property
    def rounds(self) -> bool:
        """It does."""
        return True

    def step(self) -> ops.steps.Step:
        """Channel by channel."""
        return ops.steps.norm(self.mean, self.scale, self.bias)


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

    def step(self) -> ops.steps.Step:
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

    @property
    def rounds(self) -> bool:
        """It does."""
        return True

    def step(self) -> ops.steps.Step:
        """Over all positions in order."""
        return ops.steps.mean()


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

    def step(self) -> ops.steps.Step:
        """The same numbers."""
        return ops.steps.flatten()


def check(spec: Spec, *, bits: bool) -> Spec:
    """Refuse bits where floats are wanted, and floats where bits are."""
    if spec.bits != bits:
        names = {True: "bits", False: "floats"}
        raise ValueError(f"expected {names[bits]}, got {names[spec.bits]}")
    return spec


def windows(
    spatial: tuple[int, ...],
    window: Any,
    strides: tuple[int, ...],
    padding: Pads,
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """How many windows fit along each spatial axis.

    Raises:
      ValueError: If an axis has no entry, or the window does not fit.
    """
    if not len(spatial) == len(window) == len(strides) == len(padding) == len(dilation):
        raise ValueError(f"expected {len(window)} spatial axes, got {len(spatial)}")
    out = tuple(
        (size + sum(pads) - (k - 1) * d - 1) // s + 1
        for size, k, s, pads, d in zip(
            spatial, window, strides, padding, dilation, strict=True
        )
    )
    if min(out) < 1:
        raise ValueError(
            f"expected a window that fits into the padded image, got window "
            f"{tuple(window)}, padding {padding} and an image of {spatial}"
        )
    return out


def pool_geometry(stage: _Pool) -> dict[str, Any]:
    """A pool's window, strides and padding."""
    return {
        "window": stage.window,
        "strides": stage.strides,
        "padding": stage.padding,
    }


STAGES: dict[str, type[Stage]] = {
    stage.kind: stage
    for stage in (
        *(RealConv, PackedConv, ScaledConv),
        *(BitsPool, SumPool, FloatPool),
        *(Norm, Relu, Sign, Mean, Flatten),
    )
}
