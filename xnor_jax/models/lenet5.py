"""LeNet-5 as in the public XNOR-Net code for MNIST."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import BatchNorm, Conv, Layered, MaxPool, XnorBlock


class LeNet5(Layered):
    """Two convolutions and two dense layers; the middle two are binary.

    | layer | output, for 28×28×1 |
    |---|---|
    | real 5×5 conv, valid; BatchNorm without scale and bias; ReLU | 24×24×20 |
    | 2×2 max-pool, stride 2 | 12×12×20 |
    | binary block, 5×5 conv, valid | 8×8×50 |
    | 2×2 max-pool, stride 2 | 4×4×50 |
    | binary block, dense (BatchNorm over the 50 channels) | 500 |
    | real dense | 10 |

    Args:
      image_shape: Height, width, channels of an image, at least 16×16.
      classes: Number of logits.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **block: Passed on to both `XnorBlock`s, such as `rule` or `surrogate`.

    Raises:
      ValueError: If an image is too small for the two convolutions and pools, or
        `image_shape` is not three numbers of at least 1.

    References:
      LeCun et al., 1998; jiecaoyu/XNOR-Net-PyTorch, `MNIST/models/LeNet_5.py`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        classes: int = 10,
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.image_shape = check_image_shape(
            "LeNet5", image_shape, classes, smallest=16
        )
        *spatial, channels = self.image_shape
        pooled = [((size - 4) // 2 - 4) // 2 for size in spatial]
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        self.conv1 = Conv(channels, 20, (5, 5), padding="VALID", **common)
        self.norm1 = BatchNorm(
            20, momentum=0.9, epsilon=1e-4, use_bias=False, use_scale=False, **common
        )
        block = {"binary": binary, **common, **block}
        self.block2 = XnorBlock(20, 50, (5, 5), padding="VALID", **block)
        self.block3 = XnorBlock(prod(pooled) * 50, 500, norm_features=50, **block)
        self.dense4 = nnx.Linear(500, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return (
            self.conv1,
            self.norm1,
            nnx.relu,
            MaxPool(2, 2),
            self.block2,
            MaxPool(2, 2),
            self.block3,
            self.dense4,
        )
