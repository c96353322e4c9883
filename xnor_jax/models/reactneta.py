"""ReActNet-A: a binary MobileNet, for ImageNet."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import (
    AvgPool,
    BatchNorm,
    BinaryConv,
    Conv,
    GlobalAveragePool,
    Layered,
    RPReLU,
    RSign,
    residual_sum,
)

_BLOCKS = (64, 128, 128, 256, 256, *6 * (512,), 1024, 1024)


class ReActNetA(Layered):
    """A convolution, thirteen blocks, a dense layer; the blocks are binary.

    | layer | output, for 224×224×3 |
    |---|---|
    | real 3×3 conv, stride 2, pad 1; BatchNorm | 112×112×32 |
    | one block, 64 | 112×112×64 |
    | two blocks, 128, the first with stride 2 | 56×56×128 |
    | two blocks, 256, the first with stride 2 | 28×28×256 |
    | six blocks, 512, the first with stride 2 | 14×14×512 |
    | two blocks, 1024, the first with stride 2 | 7×7×1024 |
    | global average-pool | 1024 |
    | real dense | 1000 |

    A block is a `ReActBlock`. No convolution has a bias.

    Args:
      image_shape: Height, width, channels of an image.
      classes: Number of logits.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **conv: Passed on to every `BinaryConv`, such as `rule`.

    Raises:
      ValueError: If `image_shape` is not three numbers of at least 1.

    References:
      Liu et al., ReActNet, 2020, §4; liuzechun/ReActNet,
      `mobilenet/2_step2/reactnet.py`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (224, 224, 3),
        classes: int = 1000,
        surrogate: str | Callable[..., jax.Array] = "approx",
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        self.image_shape = check_image_shape("ReActNetA", image_shape, classes)
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        conv = {"surrogate": surrogate, "binary": binary, **common, **conv}
        stem: dict[str, Any] = {"strides": 2, "padding": 1, "use_bias": False, **common}
        self.conv1 = Conv(self.image_shape[-1], 32, (3, 3), **stem)
        self.norm1 = BatchNorm(32, momentum=0.9, **common)
        blocks, before = [], 32
        for features in _BLOCKS:
            strides = 2 if before < features != 64 else 1
            blocks.append(ReActBlock(before, features, strides=strides, **conv))
            before = features
        self.blocks = nnx.List(blocks)
        self.dense28 = nnx.Linear(1024, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return self.conv1, self.norm1, *self.blocks, GlobalAveragePool(), self.dense28


class ReActBlock(nnx.Module):
    """A binary 3×3 and one or two binary 1×1 convolutions, each with a shortcut.

    `y = RPReLU(BN(conv3×3(RSign(x))) + x)`; at stride 2 the shortcut `x` is averaged
    over 2×2 pixels. Then `RPReLU(BN(conv1×1(RSign(y))) + y)`. A block that doubles the
    channels has two 1×1 convolutions, each with its own BatchNorm and the shortcut `y`;
    their sums are concatenated before the `RPReLU`.

    The float twin and a block with real activations have `x − β` in place of
    `RSign(x) = sign(x − β)`.

    Args:
      in_features: Input channels.
      out_features: Output channels: `in_features`, or twice that.
      strides: 1, or 2 to halve the height and width.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **conv: Passed on to every `BinaryConv`, such as `rule`.

    Raises:
      ValueError: If `out_features` is neither `in_features` nor twice that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int,
        surrogate: str | Callable[..., jax.Array],
        binary: bool,
        backend: str,
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        if out_features not in (in_features, 2 * in_features):
            raise ValueError(
                f"ReActBlock: expected {in_features} or {2 * in_features} output "
                f"channels for {in_features} input channels, got {out_features}"
            )
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        conv = {
            "use_bias": False,
            "binary": binary,
            "surrogate": None,
            **common,
            **conv,
        }

        def norm() -> BatchNorm:
            return BatchNorm(in_features, momentum=0.9, **common)

        self.pool = AvgPool(2, 2, "SAME") if strides == 2 else None
        self.sign1 = RSign(in_features, surrogate=surrogate, rngs=rngs)
        self.conv1 = BinaryConv(
            in_features, in_features, (3, 3), strides=strides, padding=1, **conv
        )
        self.norm1 = norm()
        self.activation1 = RPReLU(in_features, rngs=rngs)
        self.sign2 = RSign(in_features, surrogate=surrogate, rngs=rngs)
        count = out_features // in_features
        self.conv2 = nnx.List(
            [BinaryConv(in_features, in_features, (1, 1), **conv) for _ in range(count)]
        )
        self.norm2 = nnx.List([norm() for _ in range(count)])
        self.activation2 = RPReLU(out_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H', W', C_out]`."""
        add = partial(residual_sum, backend=self.conv1.backend)
        y = self.norm1(self.conv1(self._sign(self.sign1, x)))
        y = self.activation1(add(y, x if self.pool is None else self.pool(x)))
        signs = self._sign(self.sign2, y)
        layers = zip(self.conv2, self.norm2, strict=True)
        halves = [add(norm(conv(signs)), y) for conv, norm in layers]
        wide = halves[0] if len(halves) == 1 else jnp.concatenate(halves, -1)
        return self.activation2(wide)

    def _sign(self, sign: RSign, x: jax.Array) -> jax.Array:
        return sign(x) if self.conv1.signs_input else x - sign.beta[...]
