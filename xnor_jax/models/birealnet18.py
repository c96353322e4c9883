"""Bi-Real Net of eighteen layers, for ImageNet."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._bireal import BiRealBlock
from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import BatchNorm, Conv, GlobalAveragePool, Layered, MaxPool

_STAGES = (64, 128, 256, 512)


class BiRealNet18(Layered):
    """Eighteen layers with shortcuts; all but the first and the last are binary.

    | layer | out, for 224×224×3 |
    |---|---|
    | conv 7×7/2, pad 3, real; BatchNorm | 112×112×64 |
    | max-pool 3/2, pad 1 | 56×56×64 |
    | four blocks, 64 | 56×56×64 |
    | a block, 128, stride 2; three blocks, 128 | 28×28×128 |
    | a block, 256, stride 2; three blocks, 256 | 14×14×256 |
    | a block, 512, stride 2; three blocks, 512 | 7×7×512 |
    | average over all positions | 512 |
    | dense, real | 1000 |

    A block is a binary convolution 3×3, pad 1; BatchNorm; the sum with the shortcut,
    which is what comes in, or at a stride of 2 an average-pool 2/2, a real 1×1
    convolution and BatchNorm. No convolution has a bias. The signs are all that is not
    linear; the float twin has `clip(x, −1, 1)` in their place.

    Args:
      image_shape: Height, width, channels of an image.
      classes: How many logits.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`.
      binary: False for the float twin.
      backend: What computes the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **conv: Passed on to every `BinaryConv`, such as `rule`.

    Raises:
      ValueError: If `image_shape` is not three numbers of at least 1.

    References:
      Liu et al., Bi-Real Net, 2018; liuzechun/Bi-Real-net,
      `pytorch_implementation/BiReal18_34/birealnet.py`.
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
        self.image_shape = check_image_shape("BiRealNet18", image_shape)
        ours: dict[str, Any] = {"backend": backend, "rngs": rngs}
        conv = {"surrogate": surrogate, "binary": binary, **ours, **conv}
        stem: dict[str, Any] = {"strides": 2, "padding": 3, "use_bias": False, **ours}
        self.conv1 = Conv(self.image_shape[-1], 64, (7, 7), **stem)
        self.norm1 = BatchNorm(64, momentum=0.9, **ours)
        blocks, before = [], 64
        for features in _STAGES:
            for _ in range(4):
                strides = 1 if before == features else 2
                blocks.append(BiRealBlock(before, features, strides=strides, **conv))
                before = features
        self.blocks = nnx.List(blocks)
        self.dense18 = nnx.Linear(512, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """What runs, in this order, on images `[N, H, W, C]`."""
        return (
            self.conv1,
            self.norm1,
            MaxPool(3, 2, 1),
            *self.blocks,
            GlobalAveragePool(),
            self.dense18,
        )
