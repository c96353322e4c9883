"""Trained networks at one bit a weight: pack, run on integers, save, load."""

from xnor_jax.deploy.format import FormatError, load, save
from xnor_jax.deploy.packed import Info, PackedModel, Preprocessing, pack
from xnor_jax.deploy.report import Report, Row

__all__ = [
    "FormatError",
    "Info",
    "PackedModel",
    "Preprocessing",
    "Report",
    "Row",
    "load",
    "pack",
    "save",
]
