"""The networks of the papers, one per module.

Every model takes `(*, image_shape, classes, rngs, **options)`.
"""

from xnor_jax.models.alexnet import AlexNet
from xnor_jax.models.birealnet18 import BiRealNet18
from xnor_jax.models.lenet5 import LeNet5
from xnor_jax.models.nin import NIN
from xnor_jax.models.reactneta import ReActNetA
from xnor_jax.models.resnet18 import ResNet18
from xnor_jax.models.resnet20 import ResNet20
from xnor_jax.models.vggsmall import VGGSmall
from xnor_jax.registry import MODELS

__all__ = [
    "MODELS",
    "NIN",
    "AlexNet",
    "BiRealNet18",
    "LeNet5",
    "ReActNetA",
    "ResNet18",
    "ResNet20",
    "VGGSmall",
]
