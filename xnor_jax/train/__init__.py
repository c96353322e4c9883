"""Training: recipes, the step, the loop, checkpoints and figures.

Submodules are imported on first use; importing the package loads none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xnor_jax.train.api import Run, load, run, run_seeds
    from xnor_jax.train.folder import RunError, RunWarning
    from xnor_jax.train.recipe import PRESETS, Recipe, RecipeError

__all__ = [
    "PRESETS",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "RunWarning",
    "load",
    "run",
    "run_seeds",
]

_HOMES = {
    "api": ("Run", "load", "run", "run_seeds"),
    "folder": ("RunError", "RunWarning"),
    "recipe": ("PRESETS", "Recipe", "RecipeError"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
