"""Stages that multiply: convolutions and dense layers, of reals and of signs."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from xnor_jax import convolution, ops
from xnor_jax.deploy.stage import Spec, Stage, Value, check, static
from xnor_jax.geometry import Pads, conv_geometry
from xnor_jax.ops import Affine, Bits, Epilogue, PackedKernel, Threshold


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
        geometry = conv_geometry(self.kind, spec.shape[:-1], window, **self._geometry)
        return Spec((*geometry.out, features), self._to_bits())

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

    def step(self, *, exact: bool) -> ops.steps.Step | None:
        """One group, at most two spatial axes; dense only where no sign follows.

        XLA is slow at the first convolution: its speed is worth the sign that rounding
        turns in about one image of 10,000.
        """
        if self.groups > 1 or self.kernel.ndim > 4 or (exact and self.kernel.ndim == 2):
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

    def step(self, *, exact: bool) -> ops.steps.Step | None:
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
        return y * self.input_scale(x) + self.bias

    def input_scale(self, x: jax.Array) -> jax.Array:
        """The paper's `K`: the mean of `|x|` over each window and all channels."""
        mean = jnp.mean(jnp.abs(x), axis=-1, keepdims=True)
        if not self.kernel.window:
            return mean
        geometry = conv_geometry(
            self.kind, x.shape[1:-1], self.kernel.window, **self._geometry
        )
        return convolution.mean_pool(mean, geometry)
