"""Bi-Real Net with 18 layers, for ImageNet."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._bireal import bireal_stages
from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import BatchNorm, Conv, GlobalAveragePool, Layered, MaxPool


class BiRealNet18(Layered):
    """Eighteen layers with shortcuts; all but the first and the last are binary.

    | layer | output, for 224×224×3 |
    |---|---|
    | real 7×7 conv, stride 2, pad 3; BatchNorm | 112×112×64 |
    | 3×3 max-pool, stride 2, pad 1 | 56×56×64 |
    | four blocks, 64 | 56×56×64 |
    | four blocks, 128, the first with stride 2 | 28×28×128 |
    | four blocks, 256, the first with stride 2 | 14×14×256 |
    | four blocks, 512, the first with stride 2 | 7×7×512 |
    | global average-pool | 512 |
    | real dense | 1000 |

    A block is a binary 3×3 convolution, pad 1; BatchNorm; the sum with the shortcut.
    The shortcut is the identity, or at stride 2 a 2×2 average-pool, a real 1×1
    convolution and BatchNorm. No convolution has a bias. The signs are the blocks' only
    nonlinearity; the float twin has `clip(x, −1, 1)` in their place.

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
        self.image_shape = check_image_shape("BiRealNet18", image_shape, classes)
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        conv = {"surrogate": surrogate, "binary": binary, **common, **conv}
        stem: dict[str, Any] = {"strides": 2, "padding": 3, "use_bias": False, **common}
        self.conv1 = Conv(self.image_shape[-1], 64, (7, 7), **stem)
        self.norm1 = BatchNorm(64, momentum=0.9, **common)
        self.blocks = bireal_stages((64, 128, 256, 512), 4, **conv)
        self.dense18 = nnx.Linear(512, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return (
            self.conv1,
            self.norm1,
            MaxPool(3, 2, 1),
            *self.blocks,
            GlobalAveragePool(),
            self.dense18,
        )
