"""The networks of the papers, each a page that reads like its table."""

from xnor_jax.models.lenet5 import LeNet5
from xnor_jax.models.nin import NIN

__all__ = ["NIN", "LeNet5"]
