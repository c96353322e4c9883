"""ResNet-20 with a shortcut around every binary convolution, for CIFAR-10."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._bireal import bireal_stages
from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import BatchNorm, Conv, GlobalAveragePool, Layered


class ResNet20(Layered):
    """Twenty layers with shortcuts; all but the first and the last are binary.

    | layer | output, for 32×32×3 |
    |---|---|
    | real 3×3 conv, pad 1; BatchNorm | 32×32×16 |
    | six blocks, 16 | 32×32×16 |
    | six blocks, 32, the first with stride 2 | 16×16×32 |
    | six blocks, 64, the first with stride 2 | 8×8×64 |
    | global average-pool | 64 |
    | real dense | 10 |

    A block is Bi-Real Net's, with ReActNet's activation: a binary 3×3 convolution, pad
    1; BatchNorm; the sum with the shortcut; `RPReLU`. The shortcut is the identity,
    or at stride 2 a 2×2 average-pool, a real 1×1 convolution and BatchNorm. No
    convolution has a bias.

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
      He et al., Deep Residual Learning for Image Recognition, 2015, §4.2; Liu et al.,
      Bi-Real Net, 2018; Liu et al., ReActNet, 2020, §4.2.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        classes: int = 10,
        surrogate: str | Callable[..., jax.Array] = "approx",
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **conv: Any,
    ):
        self.image_shape = check_image_shape("ResNet20", image_shape, classes)
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        conv = {"surrogate": surrogate, "binary": binary, **common, **conv}
        self.conv1 = Conv(
            self.image_shape[-1], 16, (3, 3), padding=1, use_bias=False, **common
        )
        self.norm1 = BatchNorm(16, momentum=0.9, **common)
        self.blocks = bireal_stages((16, 32, 64), 6, rprelu=True, **conv)
        self.dense20 = nnx.Linear(64, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return (
            self.conv1,
            self.norm1,
            *self.blocks,
            GlobalAveragePool(),
            self.dense20,
        )
