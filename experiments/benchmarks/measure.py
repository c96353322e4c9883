"""What the benchmarks share: cores, turns and the machine's name."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple


class Spread(NamedTuple):
    """A quantity's median over the rounds, with its extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, got {text!r}"
        )
    return int(text)


def pin(threads: int) -> list[int]:
    """Keep this process on its first cores, and return them.

    XLA sizes its CPU thread pool by the process's affinity, as do the numerical
    libraries: call it before importing any of them.
    """
    if not hasattr(os, "sched_setaffinity"):
        sys.exit("the benchmark needs sched_setaffinity, which only Linux has")
    available = sorted(os.sched_getaffinity(0))
    if threads > len(available):
        sys.exit(
            f"--threads: expected at most {len(available)}, the cores that this "
            f"process may run on, got {threads}"
        )
    os.sched_setaffinity(0, available[:threads])
    return available[:threads]


def in_turn(
    sides: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one call of each that does not count.

    Every second round runs backwards, so that no side always follows the same one.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(rounds):
        names = list(sides) if count % 2 == 0 else list(reversed(sides))
        for name in names:
            start = perf_counter()
            sides[name]()
            seconds[name].append(perf_counter() - start)
    return seconds


def describe_cpu() -> str:
    """The CPU's name as the system gives it, and how busy it has been of late."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}; load over the last minute {os.getloadavg()[0]:.1f}"
