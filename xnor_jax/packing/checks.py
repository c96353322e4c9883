"""Checks of a file: types, ranges and sizes, each refused with one line.

The limits are far above any network of this library; they keep a hostile file from
asking for memory.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LARGEST_INTEGER = 2**24  # a size, a stride, a padding, a number of channels
LARGEST_IMAGE = 2**28  # numbers in an image, padded, or in any value computed from it
LARGEST_KERNEL = 2**27  # weights
LARGEST_PACKED = 2**25  # bytes of arrays in memory beyond twice those in the file
LARGEST_NETWORK = 2**30  # bytes of all arrays in memory
LARGEST_FILE = 2**30  # bytes
LARGEST_HEADER = 2**20  # bytes
MOST_NODES = 4096
MOST_AXES = 8
MOST_CLASSES = 2**16
LONGEST_STRING = 200


def limit(what: str, size: int, largest: int) -> None:
    """Refuse a size larger than allowed; `what` names its unit.

    Raises:
      ValueError: If it is.
    """
    if size > largest:
        raise ValueError(f"expected {what} of at most {largest}, got {size}")


def mapping(value: Any) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ValueError: If it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {clip(value)}")
    return value


def fields(found: Any, wanted: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """A JSON object's entries, each through its check.

    Raises:
      ValueError: If one is missing, unknown, or refused by its check.
    """
    if unknown := sorted(mapping(found).keys() - wanted.keys()):
        raise ValueError(f"unknown entry {clip(unknown[0])}")
    result = {}
    for name, check in wanted.items():
        if name not in found:
            raise ValueError(f"expected an entry {name!r}")
        try:
            result[name] = check(found[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return result


def integer(value: Any, *, least: int = 0, largest: int = LARGEST_INTEGER) -> int:
    """A whole number in a range.

    Raises:
      ValueError: If it is none, or outside.
    """
    if type(value) is not int or not least <= value <= largest:
        raise ValueError(
            f"expected a whole number from {least} to {largest}, got {clip(value)}"
        )
    return value


def integers(
    value: Any,
    *,
    least: int = 0,
    largest: int = LARGEST_INTEGER,
    length: int | None = None,
) -> tuple[int, ...]:
    """A list of whole numbers.

    Raises:
      ValueError: If it is none, of another length, or a number is out of range.
    """
    if not isinstance(value, list) or len(value) not in (
        range(9) if length is None else (length,)
    ):
        wanted = "whole numbers" if length is None else f"{length} whole numbers"
        raise ValueError(f"expected a list of {wanted}, got {clip(value)}")
    return tuple(integer(entry, least=least, largest=largest) for entry in value)


def a_list(value: Any, most: int, *, least: int = 0) -> list[Any]:
    """A JSON list.

    Raises:
      ValueError: If it is none, or shorter or longer than allowed.
    """
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ValueError(
            f"expected a list of {least} to {most} entries, got {clip(value)}"
        )
    return value


def real(value: Any, *, least: float = -math.inf, largest: float = math.inf) -> float:
    """A finite number in a range.

    Raises:
      ValueError: If it is none, or outside.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= largest or not abs(value) < 1e30:
        raise ValueError(f"expected a finite number in range, got {clip(value)}")
    return float(value)


def string(value: Any) -> str:
    """A short string that can be printed on one line.

    Raises:
      ValueError: If it is none, longer, or holds control characters.
    """
    if not isinstance(value, str) or len(value) > LONGEST_STRING:
        raise ValueError(
            f"expected a string of at most {LONGEST_STRING} characters, got "
            f"{clip(value)}"
        )
    # Escape sequences would run in a terminal that an error or a table is printed to.
    if not value.isprintable():
        raise ValueError(f"expected printable characters, got {clip(value)}")
    return value


def one_of(value: Any, *, choices: Sequence[Any]) -> Any:
    """One of some values, of the same type.

    Raises:
      ValueError: If it is none of them.
    """
    if not any(type(value) is type(one) and value == one for one in choices):
        raise ValueError(
            f"expected one of {', '.join(map(str, choices))}, got {clip(value)}"
        )
    return value


def clip(value: Any) -> str:
    """A value for an error: JSON on one line, no longer than is readable."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and abs(value) > 2**64:
        return "a huge number"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
