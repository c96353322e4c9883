"""XNOR-Networks in JAX: pure functions for training networks with one bit per weight.

Public names are imported on first use: `import xnor_jax` loads neither JAX nor the
dependencies of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xnor_jax import (
        data,
        losses,
        masks,
        models,
        nn,
        ops,
        optim,
        packing,
        quantizers,
        rules,
        train,
        weights,
        zoo,
    )
    from xnor_jax.masks import inner_kernels, mask_by_path
    from xnor_jax.packing import load, pack, save
    from xnor_jax.quantizers import sign_ste
    from xnor_jax.weights import binarize, clamp, mean_center, project, scale, sign

__version__ = "0.1.0"

__all__ = [
    "binarize",
    "clamp",
    "data",
    "inner_kernels",
    "load",
    "losses",
    "mask_by_path",
    "masks",
    "mean_center",
    "models",
    "nn",
    "ops",
    "optim",
    "pack",
    "packing",
    "project",
    "quantizers",
    "rules",
    "save",
    "scale",
    "sign",
    "sign_ste",
    "train",
    "weights",
    "zoo",
]

_FUNCTIONS = {
    "xnor_jax.masks": ("inner_kernels", "mask_by_path"),
    "xnor_jax.packing": ("load", "pack", "save"),
    "xnor_jax.quantizers": ("sign_ste",),
    "xnor_jax.weights": (
        "binarize",
        "clamp",
        "mean_center",
        "project",
        "scale",
        "sign",
    ),
}
_HOME = {name: module for module, names in _FUNCTIONS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _HOME:
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
