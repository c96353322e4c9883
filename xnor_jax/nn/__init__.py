"""Flax NNX layers: binary layers, and the layers between them.

A binary layer stores a latent kernel and computes `α · (sign(x) ⊛ sign(w))`: an integer
sum, then one multiplication per output channel. The integer sum is the same in float32,
in bfloat16 and on bits. `Conv` and `BatchNorm` are Flax's layers with a choice of
backend. A custom block trains faster on a CPU if `residual_sum` adds its shortcut.
"""

from xnor_jax.nn.activations import RPReLU, RSign
from xnor_jax.nn.binary import BinaryConv, BinaryLinear
from xnor_jax.nn.block import XnorBlock
from xnor_jax.nn.conv import Conv
from xnor_jax.nn.layered import Layered
from xnor_jax.nn.norm import BatchNorm
from xnor_jax.nn.pools import AvgPool, Flatten, GlobalAveragePool, MaxPool
from xnor_jax.ops.residual import residual_sum

__all__ = [
    "AvgPool",
    "BatchNorm",
    "BinaryConv",
    "BinaryLinear",
    "Conv",
    "Flatten",
    "GlobalAveragePool",
    "Layered",
    "MaxPool",
    "RPReLU",
    "RSign",
    "XnorBlock",
    "residual_sum",
]
