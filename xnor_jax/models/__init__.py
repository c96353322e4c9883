"""The networks of the papers, each a page that reads like its table."""

from xnor_jax.models.lenet5 import LeNet5
from xnor_jax.models.nin import NIN
from xnor_jax.models.resnet18 import ResNet18

__all__ = ["NIN", "LeNet5", "ResNet18"]
