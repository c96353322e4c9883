"""AlexNet as in the public XNOR-Net code for ImageNet."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from flax import nnx

from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import BatchNorm, Conv, Flatten, Layered, MaxPool, XnorBlock


def _init_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal values of standard deviation 2/n, for `n` weights per filter."""
    return nnx.initializers.normal(2 / prod(shape[:-1]))(key, shape, dtype)


class AlexNet(Layered):
    """Five convolutions and three dense layers; the six in the middle are binary.

    | layer | output, for 227×227×3 |
    |---|---|
    | real 11×11 conv, stride 4, valid; BatchNorm; ReLU | 55×55×96 |
    | 3×3 max-pool, stride 2 | 27×27×96 |
    | binary block, 5×5 conv, pad 2 | 27×27×256 |
    | 3×3 max-pool, stride 2 | 13×13×256 |
    | binary blocks, 3×3 conv, pad 1: 384, 384, 256 | 13×13×256 |
    | 3×3 max-pool, stride 2 | 6×6×256 |
    | binary block, dense (BatchNorm over the 9216 features) | 4096 |
    | binary block, dense (dropout) | 4096 |
    | BatchNorm (ε = 1e-3); dropout; real dense | 1000 |

    Kernels are drawn from a normal distribution of standard deviation 2/n, for `n`
    weights per filter.

    Args:
      image_shape: Height, width, channels of an image, at least 67×67.
      classes: Number of logits.
      dropout: The probability of dropping a sign in the second dense block, and an
        activation before the last layer.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters and the dropout.
      **block: Passed on to every `XnorBlock`, such as `rule` or `surrogate`.

    Raises:
      ValueError: If an image is too small for the pools, or `image_shape` is not three
        numbers of at least 1.

    References:
      Krizhevsky et al., 2012; Rastegari et al., XNOR-Net, 2016, §4.2;
      jiecaoyu/XNOR-Net-PyTorch, `ImageNet/networks/model_list/alexnet.py`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (227, 227, 3),
        classes: int = 1000,
        dropout: float = 0.5,
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.image_shape = check_image_shape(
            "AlexNet", image_shape, classes, smallest=67
        )
        *spatial, channels = self.image_shape
        sizes = [(size - 11) // 4 + 1 for size in spatial]
        for _ in range(3):
            sizes = [(size - 3) // 2 + 1 for size in sizes]
        features = prod(sizes) * 256
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        init: dict[str, Any] = {"kernel_init": _init_kernel}
        block = {"binary": binary, **init, **common, **block}
        self.conv1 = Conv(
            channels, 96, (11, 11), strides=4, padding="VALID", **init, **common
        )
        self.norm1 = BatchNorm(96, momentum=0.9, epsilon=1e-4, **common)
        self.block2 = XnorBlock(96, 256, (5, 5), padding=2, **block)
        self.block3 = XnorBlock(256, 384, (3, 3), padding=1, **block)
        self.block4 = XnorBlock(384, 384, (3, 3), padding=1, **block)
        self.block5 = XnorBlock(384, 256, (3, 3), padding=1, **block)
        self.block6 = XnorBlock(features, 4096, **block)
        self.block7 = XnorBlock(4096, 4096, dropout=dropout, **block)
        self.norm8 = BatchNorm(4096, momentum=0.9, epsilon=1e-3, **common)
        self.dropout8 = nnx.Dropout(dropout, rngs=rngs)
        self.dense8 = nnx.Linear(4096, classes, **init, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order; the network maps images `[N, H, W, C]` to logits."""
        return (
            self.conv1,
            self.norm1,
            nnx.relu,
            MaxPool(3, 2),
            self.block2,
            MaxPool(3, 2),
            self.block3,
            self.block4,
            self.block5,
            MaxPool(3, 2),
            Flatten(),
            self.block6,
            self.block7,
            self.norm8,
            self.dropout8,
            self.dense8,
        )
