"""VGG-Small, as used by papers on binary networks for CIFAR-10."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import BatchNorm, Conv, Flatten, Layered, MaxPool, XnorBlock


class VGGSmall(Layered):
    """Six convolutions and a dense layer; all but the first and the last are binary.

    | layer | output, for 32×32×3 |
    |---|---|
    | real 3×3 conv, pad 1 | 32×32×128 |
    | 3×3 binary block, pad 1: 128; 2×2 max-pool, stride 2 | 16×16×128 |
    | 3×3 binary blocks, pad 1: 256, 256; 2×2 max-pool, stride 2 | 8×8×256 |
    | 3×3 binary blocks, pad 1: 512, 512; 2×2 max-pool, stride 2 | 4×4×512 |
    | BatchNorm; clip to [−1, 1] | 4×4×512 |
    | real dense | 10 |

    The blocks are BatchNorm → sign → convolution, without a ReLU. The float twin and
    networks with real activations have no signs; there a ReLU follows each block's
    convolution. No convolution has a bias.

    Args:
      image_shape: Height, width, channels of an image, at least 8×8.
      classes: Number of logits.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **block: Passed on to every `XnorBlock`, such as `rule` or `surrogate`.

    Raises:
      ValueError: If an image is too small for the three pools, or `image_shape` is not
        three numbers of at least 1.

    References:
      Zhang et al., LQ-Nets, 2018, §5.1; htqin/IR-Net, `CIFAR-10/VGG-Small/vgg.py`;
      z-hXu/ReCU, `cifar/models_cifar/vgg.py`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        classes: int = 10,
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.image_shape = check_image_shape(
            "VGGSmall", image_shape, classes, smallest=8
        )
        height, width, channels = self.image_shape
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        norm: dict[str, Any] = {"epsilon": 1e-5, "momentum": 0.9}
        same: dict[str, Any] = {"padding": 1, "use_bias": False, **common}
        signs = binary and block.get("precision") != "1w32a"
        block = {"binary": binary, "relu": not signs, **norm, **same, **block}
        self.conv1 = Conv(channels, 128, (3, 3), **same)
        self.block2 = XnorBlock(128, 128, (3, 3), **block)
        self.block3 = XnorBlock(128, 256, (3, 3), **block)
        self.block4 = XnorBlock(256, 256, (3, 3), **block)
        self.block5 = XnorBlock(256, 512, (3, 3), **block)
        self.block6 = XnorBlock(512, 512, (3, 3), **block)
        self.norm7 = BatchNorm(512, **norm, **common)
        self.dense7 = nnx.Linear((height // 8) * (width // 8) * 512, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return (
            self.conv1,
            self.block2,
            MaxPool(2, 2),
            self.block3,
            self.block4,
            MaxPool(2, 2),
            self.block5,
            self.block6,
            MaxPool(2, 2),
            self.norm7,
            nnx.hard_tanh,
            Flatten(),
            self.dense7,
        )
