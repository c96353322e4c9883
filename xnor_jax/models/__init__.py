"""The networks of the papers, each a page that reads like its table.

A model takes `(*, image_shape, classes, rngs, **options)`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from flax import nnx

from xnor_jax.models.lenet5 import LeNet5
from xnor_jax.models.nin import NIN
from xnor_jax.models.resnet18 import ResNet18

MODELS: Mapping[str, Callable[..., nnx.Module]] = MappingProxyType(
    {"lenet5": LeNet5, "nin": NIN, "resnet18": ResNet18}
)

__all__ = ["MODELS", "NIN", "LeNet5", "ResNet18"]
