"""Image data sets by name, their types, and `load`.

Importing this package requires only the standard library. The submodules read pictures,
Parquet tables and batches.
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
