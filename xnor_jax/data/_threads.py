"""A function over many items, in a few threads."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_U = TypeVar("_U")

# A future each for a million items would take a gigabyte.
_AT_ONCE = 4096


def in_threads(function: Callable[[_T], _U], items: Sequence[_T]) -> Iterator[_U]:
    """Yield `function(item)` of each item, in order."""
    with ThreadPoolExecutor() as pool:
        try:
            for first in range(0, len(items), _AT_ONCE):
                yield from pool.map(function, items[first : first + _AT_ONCE])
        finally:
            pool.shutdown(cancel_futures=True)
