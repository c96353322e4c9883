"""ResNet-18 as an XNOR-Network, for ImageNet and for CIFAR."""

from functools import partial
from typing import Any, Literal

import jax
from flax import nnx

from xnor_jax.models._images import check_image_shape
from xnor_jax.nn import (
    BatchNorm,
    Conv,
    GlobalAveragePool,
    MaxPool,
    XnorBlock,
    residual_sum,
)


class ResNet18(nnx.Module):
    """Eighteen layers with shortcuts; all but the first and the last are binary.

    | layer | output, for 224×224×3 |
    |---|---|
    | real 7×7 conv, stride 2, pad 3; BatchNorm; ReLU | 112×112×64 |
    | 3×3 max-pool, stride 2, pad 1 | 56×56×64 |
    | two residual blocks, 64 | 56×56×64 |
    | two residual blocks, 128, the first with stride 2 | 28×28×128 |
    | two residual blocks, 256, the first with stride 2 | 14×14×256 |
    | two residual blocks, 512, the first with stride 2 | 7×7×512 |
    | global average-pool | 512 |
    | real dense | 1000 |

    A residual block is two binary 3×3 blocks, pad 1; the ReLU of the second follows the
    sum with the shortcut. The shortcut is the identity, or where the shape changes a
    real 1×1 convolution and BatchNorm. (This is the paper's "short-cut type B". The
    paper does not say whether it is binary, and the authors' code has no ResNet; later
    work keeps it real.) No convolution has a bias.

    For images as small as CIFAR's, `stem="cifar"` replaces the first two rows by a real
    3×3 convolution, pad 1, BatchNorm and ReLU, without a pool. The stem then maps
    32×32×3 to 32×32×64, and the last residual block's output is 4×4×512.

    Args:
      image_shape: Height, width, channels of an image.
      classes: Number of logits.
      stem: `"imagenet"` or `"cifar"`.
      binary: False for the float twin.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **block: Passed on to every `XnorBlock`, such as `rule` or `surrogate`.

    Raises:
      ValueError: If `image_shape` is not three numbers of at least 1, or `stem` is
        unknown.

    References:
      He et al., Deep Residual Learning for Image Recognition, 2015, Table 1;
      Rastegari et al., XNOR-Net, 2016, §4.2. CIFAR's stem: htqin/IR-Net,
      `CIFAR-10/ResNet18/resnet.py`.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (224, 224, 3),
        classes: int = 1000,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        binary: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        if stem not in ("imagenet", "cifar"):
            raise ValueError(
                f'ResNet18: stem: expected "imagenet" or "cifar", got {stem!r}'
            )
        self.image_shape = check_image_shape("ResNet18", image_shape, classes)
        size, strides, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        residual = partial(Residual, binary=binary, **common, **block)
        conv = {"strides": strides, "padding": padding, "use_bias": False, **common}
        self.conv1 = Conv(self.image_shape[-1], 64, (size, size), **conv)
        self.norm1 = BatchNorm(64, momentum=0.9, epsilon=1e-4, **common)
        self.pool = MaxPool(3, 2, 1) if stem == "imagenet" else None
        self.residual2 = residual(64, 64)
        self.residual3 = residual(64, 64)
        self.residual4 = residual(64, 128, strides=2)
        self.residual5 = residual(128, 128)
        self.residual6 = residual(128, 256, strides=2)
        self.residual7 = residual(256, 256)
        self.residual8 = residual(256, 512, strides=2)
        self.residual9 = residual(512, 512)
        self.dense10 = nnx.Linear(512, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[N, H, W, C]` to logits `[N, classes]`."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = x if self.pool is None else self.pool(x)
        x = self.residual3(self.residual2(x))
        x = self.residual5(self.residual4(x))
        x = self.residual7(self.residual6(x))
        x = self.residual9(self.residual8(x))
        return self.dense10(GlobalAveragePool()(x))


# `resnet18-cifar` in `registry.MODELS`.
CifarResNet18 = partial(ResNet18, image_shape=(32, 32, 3), classes=10, stem="cifar")


class Residual(nnx.Module):
    """Two binary blocks and a shortcut: `ReLU(block2(block1(x)) + shortcut(x))`.

    Args:
      in_features: Input channels.
      out_features: Output channels.
      strides: The strides of the first block and of the shortcut.
      backend: The backend of the products; see `xnor_jax.nn.BinaryConv`.
      rngs: Keys for the parameters.
      **block: Passed on to both `XnorBlock`s.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int = 1,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **block: Any,
    ):
        self.backend = backend
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        block = {"padding": 1, "use_bias": False, **common, **block}
        self.block1 = XnorBlock(
            in_features, out_features, (3, 3), strides=strides, **block
        )
        self.block2 = XnorBlock(out_features, out_features, (3, 3), relu=False, **block)
        same = strides == 1 and in_features == out_features
        self.shortcut = (
            None
            if same
            else Shortcut(in_features, out_features, strides=strides, **common)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H', W', C_out]`."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.block2(self.block1(x))
        return nnx.relu(residual_sum(y, shortcut, backend=self.backend))


class Shortcut(nnx.Module):
    """The shortcut where the shape changes: a real 1×1 convolution and BatchNorm."""

    keep_real = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        strides: int,
        backend: str,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        conv = {"strides": strides, "padding": "VALID", "use_bias": False, **common}
        self.conv = Conv(in_features, out_features, (1, 1), **conv)
        self.norm = BatchNorm(out_features, momentum=0.9, epsilon=1e-4, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, C]` to `[N, H', W', C_out]`."""
        return self.norm(self.conv(x))
