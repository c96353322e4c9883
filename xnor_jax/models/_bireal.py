"""Bi-Real Net's block: a shortcut around every binary convolution."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xnor_jax.nn import (
    AvgPool,
    BatchNorm,
    BinaryConv,
    Conv,
    RPReLU,
    residual_sum,
)


class BiRealBlock(nnx.Module):
    """A binary 3×3 convolution and BatchNorm, with a shortcut around both.

    `y = f(BN(α · (sign(x) ⊛ sign(w))) + shortcut(x))`, where `f` is `RPReLU` or the
    identity. The shortcut is `x`, or a `Downsample` where the shape changes.

    The float twin and a block with real activations have no sign. Without `f` they
    would be linear, so `clip(x, −1, 1)` replaces the sign, as in the real network from
    which the paper takes its initial weights.

    Args:
      in_features: Input channels.
      out_features: Output channels.
      strides: 1, or 2 to halve the height and width.
      rprelu: Whether `f` is `RPReLU`.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **conv: Passed on to `BinaryConv`, such as `rule` or `surrogate`.

    Raises:
      ValueError: If `strides` is not 1 or 2, or not 2 where the channels change.

    References:
      Liu et al., Bi-Real Net, 2018, §3.2 and §3.3; Liu et al., ReActNet, 2020, §4.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        rprelu: bool = False,
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        same = strides == 1 and in_features == out_features
        if not same and strides != 2:
            raise ValueError(
                "BiRealBlock: expected strides=2, or 1 if the channels stay the same, "
                f"got strides={strides} and {in_features} to {out_features} channels"
            )
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        self.conv = BinaryConv(
            in_features,
            out_features,
            (3, 3),
            strides=strides,
            padding=1,
            use_bias=False,
            binary=binary,
            **common,
            **conv,
        )
        self.norm = BatchNorm(out_features, momentum=0.9, **common)
        self.shortcut = (
            None if same else Downsample(in_features, out_features, **common)
        )
        self.activation = RPReLU(out_features, rngs=rngs) if rprelu else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H', W', C_out]`."""
        clipped = not self.conv.signs_input and self.activation is None
        y = self.norm(self.conv(jnp.clip(x, -1, 1) if clipped else x))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = residual_sum(y, shortcut, backend=self.conv.backend)
        return y if self.activation is None else self.activation(y)


def bireal_stages(widths: Sequence[int], blocks: int, **options: Any) -> nnx.List:
    """Stages of `blocks` blocks; each stage but the first starts with stride 2.

    Args:
      widths: The output channels of each stage; the first has as many input channels.
      blocks: The number of blocks of a stage.
      **options: Passed on to every `BiRealBlock`.
    """
    found, before = [], widths[0]
    for features in widths:
        for _ in range(blocks):
            strides = 1 if before == features else 2
            found.append(BiRealBlock(before, features, strides=strides, **options))
            before = features
    return nnx.List(found)


class Downsample(nnx.Module):
    """The shortcut that halves the size: 2×2 average-pool, real 1×1 conv, BatchNorm.

    Args:
      in_features: Input channels.
      out_features: Output channels.
      backend: The backend of the product; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.

    References:
      Liu et al., Bi-Real Net, 2018, §4.1.
    """

    keep_real = True

    def __init__(
        self, in_features: int, out_features: int, *, backend: str, rngs: nnx.Rngs
    ):
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        self.conv = Conv(in_features, out_features, (1, 1), use_bias=False, **common)
        self.norm = BatchNorm(out_features, momentum=0.9, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, ⌈H/2⌉, ⌈W/2⌉, C_out]`."""
        return self.norm(self.conv(AvgPool(2, 2, "SAME")(x)))
