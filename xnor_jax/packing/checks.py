"""Checks of a file's entries: types, ranges and sizes, with one-line errors.

The limits are far above any network of this library; they bound the memory that a
malicious file can claim.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LARGEST_INTEGER = 2**24  # a size, a stride, a padding, a number of channels
LARGEST_IMAGE = 2**28  # numbers in an image, padded, or in any value computed from it
LARGEST_KERNEL = 2**27  # weights
LARGEST_PACKED = 3 * 2**24  # bytes of arrays in memory, beyond twice those stored
LARGEST_NETWORK = 2**30  # bytes of all arrays in memory
LARGEST_FILE = 2**30  # bytes
LARGEST_HEADER = 2**20  # bytes
MOST_NODES = 4096
MOST_AXES = 8
MOST_INPUTS = 8  # of a node
MOST_CLASSES = 2**16
LONGEST_STRING = 200


def limit(what: str, count: int, largest: int) -> None:
    """Check a count against a limit; `what` names what is counted, in the plural.

    Raises:
      ValueError: If `count` is larger than `largest`.
    """
    if count > largest:
        raise ValueError(f"expected at most {largest} {what}, got {count}")


def mapping(value: Any) -> dict[str, Any]:
    """Check that a value is a JSON object, and return it.

    Raises:
      ValueError: If it is not an object.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {clip(value)}")
    return value


def fields(found: Any, wanted: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """Check each entry of a JSON object, and return the results.

    Raises:
      ValueError: If an entry is missing, unknown, or fails its check.
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
    """Check that a value is an integer in a range, and return it.

    Raises:
      ValueError: If it is not an integer, or outside the range.
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
    """Check that a value is a list of integers in a range; return a tuple.

    Raises:
      ValueError: If it is not a list of integers, has another length than `length` (at
        most 8 if None), or an integer is out of range.
    """
    if not isinstance(value, list) or len(value) not in (
        range(9) if length is None else (length,)
    ):
        wanted = "whole numbers" if length is None else f"{length} whole numbers"
        raise ValueError(f"expected a list of {wanted}, got {clip(value)}")
    return tuple(integer(entry, least=least, largest=largest) for entry in value)


def sequence(value: Any, most: int, *, least: int = 0) -> list[Any]:
    """Check that a value is a JSON list of `least` to `most` entries, and return it.

    Raises:
      ValueError: If it is not a list, or of another length.
    """
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ValueError(
            f"expected a list of {least} to {most} entries, got {clip(value)}"
        )
    return value


def real(value: Any, *, least: float = -math.inf, largest: float = math.inf) -> float:
    """Check that a value is a number in a range, below 1e30 in magnitude; return it.

    Raises:
      ValueError: If it is not a number, or outside the range.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= largest or not abs(float(value)) < 1e30:
        raise ValueError(f"expected a finite number in range, got {clip(value)}")
    return float(value)


def string(value: Any) -> str:
    """Check that a value is a short printable string, and return it.

    Raises:
      ValueError: If it is not a string, is longer than `LONGEST_STRING`, or has
        unprintable characters.
    """
    if not isinstance(value, str) or len(value) > LONGEST_STRING:
        raise ValueError(
            f"expected a string of at most {LONGEST_STRING} characters, got "
            f"{clip(value)}"
        )
    # A terminal that prints an error or a table would interpret escape sequences.
    if not value.isprintable():
        raise ValueError(f"expected printable characters, got {clip(value)}")
    return value


def one_of(value: Any, *, choices: Sequence[Any]) -> Any:
    """Check that a value equals one of `choices`, in type too, and return it.

    Raises:
      ValueError: If it equals none of them.
    """
    if not any(type(value) is type(one) and value == one for one in choices):
        raise ValueError(
            f"expected one of {', '.join(map(str, choices))}, got {clip(value)}"
        )
    return value


def clip(value: Any) -> str:
    """Format a value for an error message, as one short line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and abs(value) > 2**64:
        return "a huge number"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
