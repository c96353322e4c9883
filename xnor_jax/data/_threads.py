"""Mapping a function over many items in a thread pool."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_U = TypeVar("_U")

# Limits the pending futures: a million of them would take a gigabyte.
_AT_ONCE = 4096


def in_threads(function: Callable[[_T], _U], items: Sequence[_T]) -> Iterator[_U]:
    """Yield `function(item)` for each item in order, computed in a thread pool."""
    with ThreadPoolExecutor() as pool:
        try:
            for first in range(0, len(items), _AT_ONCE):
                yield from pool.map(function, items[first : first + _AT_ONCE])
        finally:
            pool.shutdown(cancel_futures=True)
