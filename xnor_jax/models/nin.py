"""Network in Network as in the public XNOR-Net code for CIFAR-10."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import (
    AvgPool,
    BatchNorm,
    Conv,
    GlobalAveragePool,
    Layered,
    MaxPool,
    XnorBlock,
)


class NIN(Layered):
    """Nine convolutions; all but the first and the last are binary.

    | layer | output, for 32×32×3 |
    |---|---|
    | real 5×5 conv, pad 2; BatchNorm without scale and bias; ReLU | 32×32×192 |
    | 1×1 binary blocks: 160, 96 | 32×32×96 |
    | 3×3 max-pool, stride 2, pad 1 | 16×16×96 |
    | 5×5 binary block, pad 2 (dropout): 192; 1×1 binary blocks: 192, 192 | 16×16×192 |
    | 3×3 average-pool, stride 2, pad 1, counting the padding | 8×8×192 |
    | 3×3 binary block, pad 1 (dropout): 192; 1×1 binary block: 192 | 8×8×192 |
    | BatchNorm without scale and bias; real 1×1 conv; ReLU | 8×8×10 |
    | global average-pool | 10 |

    Args:
      image_shape: Height, width, channels of an image.
      classes: Number of logits.
      dropout: The probability of dropping a sign in the 5×5 and 3×3 blocks.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters and the dropout.
      **block: Passed on to every `XnorBlock`, such as `rule` or `surrogate`.

    Raises:
      ValueError: If `image_shape` is not three numbers of at least 1.

    References:
      Lin et al., Network In Network, 2014; jiecaoyu/XNOR-Net-PyTorch,
      `CIFAR_10/models/nin.py`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        classes: int = 10,
        dropout: float = 0.5,
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.image_shape = check_image_shape("NIN", image_shape, classes)
        channels = self.image_shape[-1]
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        init = nnx.initializers.normal(0.05)
        layer: dict[str, Any] = {"kernel_init": init, **common}
        norm: dict[str, Any] = {
            "momentum": 0.9,
            "epsilon": 1e-4,
            "use_bias": False,
            "use_scale": False,
            **common,
        }
        block = {"binary": binary, **layer, **block}
        self.conv1 = Conv(channels, 192, (5, 5), padding=2, **layer)
        self.norm1 = BatchNorm(192, **norm)
        self.block2 = XnorBlock(192, 160, (1, 1), **block)
        self.block3 = XnorBlock(160, 96, (1, 1), **block)
        self.block4 = XnorBlock(96, 192, (5, 5), padding=2, dropout=dropout, **block)
        self.block5 = XnorBlock(192, 192, (1, 1), **block)
        self.block6 = XnorBlock(192, 192, (1, 1), **block)
        self.block7 = XnorBlock(192, 192, (3, 3), padding=1, dropout=dropout, **block)
        self.block8 = XnorBlock(192, 192, (1, 1), **block)
        self.norm9 = BatchNorm(192, **norm)
        self.conv9 = Conv(192, classes, (1, 1), **layer)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return (
            self.conv1,
            self.norm1,
            nnx.relu,
            self.block2,
            self.block3,
            MaxPool(3, 2, 1),
            self.block4,
            self.block5,
            self.block6,
            AvgPool(3, 2, 1),
            self.block7,
            self.block8,
            self.norm9,
            self.conv9,
            nnx.relu,
            GlobalAveragePool(),
        )
