"""Trained networks with one bit per weight: pack, run on integers, save, load."""

from xnor_jax.packing.compiler import pack
from xnor_jax.packing.file import FormatError, load, save
from xnor_jax.packing.network import Info, PackedModel, Preprocessing
from xnor_jax.packing.report import Report, Row
from xnor_jax.packing.trace import PackError

__all__ = [
    "FormatError",
    "Info",
    "PackError",
    "PackedModel",
    "Preprocessing",
    "Report",
    "Row",
    "load",
    "pack",
    "save",
]
