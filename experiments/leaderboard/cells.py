"""The leaderboards' choices: each is options of a board's `xnor-jax train` command.

Networks and optimizers that have no name in the library are here, to be named as
`cells:NAME` from this folder.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

import xnor_jax as xnor
from xnor_jax.models import LeNet5
from xnor_jax.nn import (
    BatchNorm,
    BinaryConv,
    BinaryLinear,
    Conv,
    Flatten,
    Layered,
    MaxPool,
    XnorBlock,
)


class Board(NamedTuple):
    """A recipe, and cells that each change one choice or combine several."""

    recipe: str  # arguments of `xnor-jax train`
    epochs: int
    cells: dict[str, dict[str, str]]  # more options, by kind of choice and name


FASHION: dict[str, dict[str, str]] = {
    "baseline": {"the recipe": ""},
    "network": {
        "float twin": "--no-binary",
        "weights alone binary (1w32a)": "--precision 1w32a",
        "activations alone binary (32w1a)": "--precision 32w1a",
        # The first layer cannot be: centring leaves nothing of one channel.
        "last layer binary too": "--model cells:BinaryLast",
        "convolution before BatchNorm": "--model cells:ConvFirst",
        "input scale K": "--input-scale",
    },
    "rule": {name: f"--rule {name}" for name in ("paper", "exact", "ste")},
    "surrogate": {
        name: f"--surrogate {name}" for name in ("identity", "approx", "swish", "tanh")
    },
    "weights": {
        "libra": "--weight-method libra",
        "recu": "--weight-method recu",
    },
    "optimizer": {
        "adamw": "--optimizer adamw --weight-decay 0.01",
        "sgd": "--optimizer sgd --learning-rate 0.005",
        "bop": "--optimizer cells:bop --rule ste",
    },
    "training aid": {
        "warm-up": "--warmup-epochs 1",
        "label smoothing": "--label-smoothing 0.1",
        "mixup": "--mixup",
        "distillation": "--teacher {runs}/float-twin/seed{seed}",
        "two stages": "--initial {runs}/activations-alone-binary-32w1a/seed{seed}",
    },
    "best": {
        "distillation, mixup": "--mixup --teacher {runs}/float-twin/seed{seed}",
        "approx, warm-up": "--surrogate approx --warmup-epochs 1",
        "approx, warm-up, distillation": "--surrogate approx --warmup-epochs 1"
        " --teacher {runs}/float-twin/seed{seed}",
        "approx, warm-up, distillation, convolution first": "--surrogate approx"
        " --warmup-epochs 1 --teacher {runs}/float-twin/seed{seed}"
        " --model cells:ConvFirst",
    },
}

# The recipe has approx, AdamW without decay and warm-up already.
CIFAR10: dict[str, dict[str, str]] = {
    "baseline": {"the recipe": ""},
    "network": {
        "float twin": "--no-binary",
        "weights alone binary (1w32a)": "--precision 1w32a",
        "activations alone binary (32w1a)": "--precision 32w1a",
        "input scale K": "--input-scale",
    },
    "rule": {name: f"--rule {name}" for name in ("paper", "exact", "ste")},
    "surrogate": {
        "clipped ste": "--surrogate ste",  # "ste" is a rule
        **{name: f"--surrogate {name}" for name in ("identity", "swish", "tanh")},
    },
    "weights": {name: f"--weight-method {name}" for name in ("libra", "recu")},
    "optimizer": {
        "weight decay": "--weight-decay 0.01",
        "sgd": "--optimizer sgd --learning-rate 0.1",
        "bop": "--optimizer cells:bop --rule ste --weight-decay 1e-5",
    },
    "training aid": {
        "no warm-up": "--warmup-epochs 0",
        "mixup": "--mixup",
        "distillation": "--teacher {runs}/float-twin/seed{seed}",
        "distillation, ResNet-18": "--teacher {runs}/resnet18",
        "two stages": "--initial {runs}/activations-alone-binary-32w1a/seed{seed}",
    },
}

BOARDS = {
    "fashion": Board("fashion-lenet5", 20, FASHION),
    "cifar10": Board(
        "cifar10-resnet20 --batch-size 256 --learning-rate 0.01", 15, CIFAR10
    ),
}


class BinaryLast(LeNet5):
    """LeNet-5 whose logits are products of signs, scaled by α."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        classes: int,
        binary: bool,
        backend: str,
        rngs: nnx.Rngs,
        **block: Any,
    ):
        super().__init__(
            image_shape=image_shape,
            classes=classes,
            binary=binary,
            backend=backend,
            rngs=rngs,
            **block,
        )
        block = {"binary": binary, "backend": backend, "rngs": rngs, **block}
        self.dense4 = XnorBlock(500, classes, relu=False, **block)


class ConvFirst(Layered):
    """LeNet-5 in the usual order: convolution, BatchNorm, sign, pool.

    Max-pools see signs, of which most are +1 afterwards: Rastegari et al., §3.2.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        classes: int,
        surrogate: str,
        backend: str,
        rngs: nnx.Rngs,
        **layer: Any,
    ):
        self.image_shape = image_shape
        self.surrogate = surrogate
        *spatial, channels = image_shape
        pooled = [((size - 4) // 2 - 4) // 2 for size in spatial]
        common: dict[str, Any] = {"backend": backend, "rngs": rngs}
        layer = {"surrogate": None, **common, **layer}
        self.conv1 = Conv(channels, 20, (5, 5), padding="VALID", **common)
        self.norm1 = BatchNorm(20, momentum=0.9, **common)
        self.conv2 = BinaryConv(20, 50, (5, 5), padding="VALID", **layer)
        self.norm2 = BatchNorm(50, momentum=0.9, **common)
        self.dense3 = BinaryLinear(prod(pooled) * 50, 500, **layer)
        self.norm3 = BatchNorm(500, momentum=0.9, **common)
        self.dense4 = nnx.Linear(500, classes, rngs=rngs)

    def layers(self) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The layers in order, for images `[N, H, W, C]`."""
        pool = MaxPool(2, 2)
        return (
            *(self.conv1, self.norm1, self._sign, pool),
            *(self.conv2, self.norm2, self._sign, pool, Flatten()),
            *(self.dense3, self.norm3, nnx.relu, self.dense4),
        )

    def _sign(self, x: jax.Array) -> jax.Array:
        return xnor.quantizers.sign(x, surrogate=self.surrogate)


def bop(learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Bop for the binary kernels, with γ proportional to the rate; Adam for the rest.

    A recipe centres the kernels after each step, which keeps almost all signs but makes
    α a little smaller than Bop's 1.
    """

    def binary(params: Any) -> Any:
        # Of an XnorBlock, or of a block of ResNet20, whose shortcut is real.
        ends = "layer/kernel", "conv/kernel"
        return xnor.mask_by_path(
            params, lambda path, _: path.endswith(ends) and "shortcut" not in path
        )

    return xnor.optim.bop(
        gamma=lambda step: 0.2 * learning_rate(step),  # from 1e-3
        threshold=1e-6,
        mask=binary,
        inner=optax.adam(learning_rate),
    )
