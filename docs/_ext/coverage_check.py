"""Warn about public names without a docstring or an entry in the API pages.

Public names are those in a module's `__all__`. Without `__all__`, they are the
functions and classes that the module defines, except names with a leading underscore.
"""

import importlib
import inspect
from collections.abc import Iterator

from sphinx.util import logging

MODULES = (
    "weights",
    "rules",
    "quantizers",
    "masks",
    "optim",
    "losses",
    "nn",
    "models",
    "ops",
    "packing",
    "data",
    "train",
    "zoo",
)


def public(name: str) -> Iterator[tuple[str, object]]:
    """Yield a module's public names and their values."""
    module = importlib.import_module(name)
    for word in getattr(module, "__all__", None) or vars(module):
        value = getattr(module, word)
        here = getattr(value, "__module__", None) == name and callable(value)
        named = hasattr(module, "__all__") and not inspect.ismodule(value)
        if named or (here and not word.startswith("_")):
            yield f"{name}.{word}", value


def faults(documented: set[str]) -> Iterator[str]:
    """Yield one message per fault."""
    package = importlib.import_module("xnor_jax")
    top = {id(getattr(package, word)): word for word in package.__all__}
    for module in MODULES:
        if module not in package.__all__:
            yield f"xnor_jax.{module} is not a public module"
        for name, value in public(f"xnor_jax.{module}"):
            top.pop(id(value), None)
            if name not in documented:
                yield f"{name} is public but missing from the API pages"
            if callable(value) and not inspect.getdoc(value):
                yield f"{name} is public but has no docstring"
    for word in top.values():
        if word not in MODULES and f"xnor_jax.{word}" not in documented:
            yield f"xnor_jax.{word} is public but missing from the API pages"


def setup(app):
    """Register with Sphinx."""

    def check(app, env):
        documented = {entry[0] for entry in env.get_domain("py").get_objects()}
        for fault in faults(documented):
            logging.getLogger(__name__).warning(fault, type="coverage")

    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
