"""The networks in the zoo, by name."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from xnor_jax.registry import expected
from xnor_jax.zoo.cards import Card

if TYPE_CHECKING:
    from xnor_jax.packing import PackedModel

_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The names of the networks, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def card(name: str) -> Card:
    """Load a network's card.

    Args:
      name: One of `names()`.

    Raises:
      ValueError: If there is no network of that name.
    """
    found = json.loads(locate(name, ".json").read_text(encoding="utf-8"))
    return Card(**found | {"classes": tuple(found["classes"])})


def load(name: str, *, backend: str = "auto") -> "PackedModel":
    """Load a packed network; see `xnor_jax.load`.

    Args:
      name: One of `names()`.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Raises:
      ValueError: If there is no network of that name, or no such backend.
      RuntimeError: If the backend is not available.
    """
    file = locate(name, ".safetensors")
    from xnor_jax import packing

    return packing.load(file, backend=backend)


def find(file: str | os.PathLike[str]) -> Path:
    """Find the path of a packed file or of a network in the zoo.

    Args:
      file: A path, or one of `names()`. A path that exists takes precedence.

    Raises:
      ValueError: If it is neither.
    """
    path = Path(file)
    if path.exists():
        return path
    if str(file) not in names():
        raise ValueError(
            f"no file {file}, and no network of that name in the zoo; "
            f"{expected(str(file), names())}"
        )
    return locate(str(file), ".safetensors")


def locate(name: str, suffix: str) -> Path:
    """Find a file of a network in the zoo.

    Args:
      name: One of `names()`.
      suffix: `".safetensors"` for its packed file, `".json"` for its card.

    Raises:
      ValueError: If there is no network of that name.
    """
    if name not in names():
        raise ValueError(
            f"zoo: unknown network {name!r}; {expected(str(name), names())}"
        )
    return _FOLDER / f"{name}{suffix}"
