"""Image sets: which there are, and how they are read.

Importing this package needs the standard library alone. What reads pictures, tables and
batches is in its submodules.
"""

from xnor_jax.data.registry import SOURCES, load
from xnor_jax.data.sets import (
    BLANK,
    Augment,
    DataError,
    Dataset,
    Fit,
    Holdout,
    ImageSet,
    Source,
    Split,
)

__all__ = [
    "BLANK",
    "SOURCES",
    "Augment",
    "DataError",
    "Dataset",
    "Fit",
    "Holdout",
    "ImageSet",
    "Source",
    "Split",
    "load",
]
