"""Registries of the package's models, rules and other parts by name.

A registry imports an object only on access. The command line can therefore validate a
name, and suggest a correction, before JAX is loaded.
"""

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Literal


class Registry(Mapping[str, Any]):
    """A mapping from names to objects, each imported on access.

    Args:
      entries: The import path `"MODULE:ATTRIBUTE"` of each name.
    """

    def __init__(self, entries: Mapping[str, str]):
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self._entries[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Registry({', '.join(self._entries)})"


def expected(name: str, names: Iterable[str]) -> str:
    """List the valid names and the closest match, for an error about an unknown name.

    >>> expected("lenet", ["lenet5", "nin"])
    "expected one of lenet5, nin; did you mean 'lenet5'?"
    """
    names = list(names)
    return f"expected one of {', '.join(names)}{suggestion(name, names)}"


def suggestion(name: str, names: Iterable[str]) -> str:
    """Suggest the closest valid name, for the end of an error about an unknown name.

    >>> suggestion("lenet", ["lenet5", "nin"])
    "; did you mean 'lenet5'?"
    """
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def find(kind: str, given: Any, registry: Registry, function: str) -> Any:
    """Look up a name in a registry; return a callable unchanged.

    Args:
      kind: The argument's name, for errors.
      given: A name or a callable.
      registry: The registry of names.
      function: A description of the callables that are accepted, for errors.

    Raises:
      ValueError: If the registry has no such name.
      TypeError: If `given` is neither a string nor callable.
    """
    if callable(given):
        return given
    if not isinstance(given, str):
        raise TypeError(f"{kind}: expected a name or {function}, got {given!r}")
    if given not in registry:
        raise ValueError(
            f"{kind}: unknown name {given!r}; expected one of {', '.join(registry)}, "
            f"or {function}{suggestion(given, registry)}"
        )
    return registry[given]


def describe(function: Callable[..., Any]) -> str:
    """Describe a callable as `module:qualname`, by which it is imported if possible.

    A callable that is not an attribute of a module (a lambda, a partial, an instance)
    gets a description that names no importable object.
    """
    if isinstance(function, functools.partial):
        words = [*map(_word, function.args)]
        words += [f"{key}={_word(value)}" for key, value in function.keywords.items()]
        return f"{describe(function.func)}({', '.join(words)})"
    named: Any = function if hasattr(function, "__qualname__") else type(function)
    module, path = named.__module__, named.__qualname__
    text = f"{module}:{path}"
    try:
        same = functools.reduce(getattr, path.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        same = None
    # The paths of lambdas and nested functions contain `<lambda>` or `<locals>`.
    return text if same == function or "<" in path else f"{text}(…)"


def _word(value: Any) -> str:
    if callable(value):
        return describe(value)
    # An object's address differs in every process.
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(repr(value).split()))


MODELS = Registry(
    {
        "lenet5": "xnor_jax.models.lenet5:LeNet5",
        "nin": "xnor_jax.models.nin:NIN",
        "alexnet": "xnor_jax.models.alexnet:AlexNet",
        "vggsmall": "xnor_jax.models.vggsmall:VGGSmall",
        "resnet18": "xnor_jax.models.resnet18:ResNet18",
        "resnet18-cifar": "xnor_jax.models.resnet18:CifarResNet18",
        "resnet20": "xnor_jax.models.resnet20:ResNet20",
        "birealnet18": "xnor_jax.models.birealnet18:BiRealNet18",
        "reactneta": "xnor_jax.models.reactneta:ReActNetA",
    }
)

RULES = Registry(
    {
        "corrected": "xnor_jax.rules:corrected",
        "paper": "xnor_jax.rules:paper",
        "exact": "xnor_jax.rules:exact",
        "ste": "xnor_jax.rules:ste",
    }
)

SURROGATES = Registry(
    {
        "ste": "xnor_jax.quantizers:ste",
        "identity": "xnor_jax.quantizers:identity",
        "approx": "xnor_jax.quantizers:approx",
        "swish": "xnor_jax.quantizers:swish",
        "tanh": "xnor_jax.quantizers:tanh",
    }
)

# Transforms of the latent kernels before binarization.
WEIGHT_METHODS = Registry(
    {
        "latent": "xnor_jax.weights:latent",
        "libra": "xnor_jax.weights:libra",
        "recu": "xnor_jax.weights:recu",
    }
)

# Bits of weights and activations.
Precision = Literal["1w1a", "1w32a", "32w1a"]

OPTIMIZERS = Registry(
    {
        "adam": "xnor_jax.train.optimizers:adam",
        "adamw": "xnor_jax.train.optimizers:adamw",
        "sgd": "xnor_jax.train.optimizers:sgd",
    }
)

SCHEDULES = Registry(
    {
        "cosine": "xnor_jax.train.optimizers:cosine",
        "linear": "xnor_jax.train.optimizers:linear",
        "steps": "xnor_jax.train.optimizers:steps",
    }
)

# Implementations of the products of signs; all return the same integers.
BACKENDS = Registry(
    {
        "float": "xnor_jax.ops.backends:FLOAT",
        "xla": "xnor_jax.ops.backends:XLA",
        "gpu": "xnor_jax.ops.backends:GPU",
        "pallas": "xnor_jax.ops.backends:PALLAS",
        "cpu": "xnor_jax.ops.backends:CPU",
    }
)
