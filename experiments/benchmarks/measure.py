"""Shared by the benchmarks: core pinning, timing in turn, and the machine's name."""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import NamedTuple

PAUSE = 0.05  # seconds


class Spread(NamedTuple):
    """A quantity's median over the rounds, with its extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def positive(text: str) -> int:
    """Parse a whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least 1, got {text!r}"
        )
    return int(text)


def pin(threads: int) -> list[int]:
    """Pin this process to its first cores, and return them.

    XLA and other numerical libraries size their thread pools by the process's affinity:
    call this before importing any of them.
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
    sides: Mapping[str, Callable[[], object]], rounds: int, pause: float = 0
) -> dict[str, list[float]]:
    """Time each side once per round, in seconds, after one warm-up call of each.

    Every second round reverses the order, so that no side always follows the same one.
    The process sleeps for `pause` seconds before each side.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(rounds):
        names = list(sides) if count % 2 == 0 else list(reversed(sides))
        for name in names:
            sleep(pause)
            start = perf_counter()
            sides[name]()
            seconds[name].append(perf_counter() - start)
    return seconds


def per_call(
    sides: Mapping[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds per call of each side in each round; a turn takes about `seconds`.

    The threads of PyTorch and ONNX Runtime spin for a while after their last call: a
    pause before each turn lets them go to sleep.
    """
    turns, counts = {}, {}
    for name, run in sides.items():
        run()  # compiles
        calls, taken = 0, 0.0
        start = perf_counter()
        while taken < seconds / 4:
            run()
            calls += 1
            taken = perf_counter() - start
        counts[name] = max(1, round(calls * seconds / taken))
        turns[name] = partial(_repeat, run, counts[name])
    return {
        name: [value / counts[name] for value in values]
        for name, values in in_turn(turns, rounds, PAUSE).items()
    }


def ratios(ours: list[float], theirs: list[float]) -> Spread:
    """The speedup of ours over theirs, round by round."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])


def print_comparison(
    times: Mapping[str, list[float]], ours: str, peers: Collection[str]
) -> None:
    """Print a row for each side, then the ratio of the best peer's time to ours."""
    print("| side | µs a call: median | min | max | ÷ ours, round by round |")
    print("|---|---|---|---|---|")
    for name, values in times.items():
        spread = [f"{1e6 * value:.1f}" for value in Spread.of(values)]
        more = ratios(times[ours], values)
        ratio = f"{more.median:.2f} ({more.least:.2f}–{more.most:.2f})"
        print(f"| {name} | {' | '.join(spread)} | {ratio} |")
    print_best(times, ours, peers)


def print_best(
    times: Mapping[str, list[float]], ours: str, peers: Collection[str]
) -> None:
    """Print the ratio of the best peer's time to ours."""
    best = min(set(peers) - {ours}, key=lambda name: median(times[name]))
    more = ratios(times[ours], times[best])
    print(
        f"best float ({best}) / {ours}: {more.median:.2f}, median of the rounds "
        f"({more.least:.2f} to {more.most:.2f})",
        flush=True,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison: rounds, seconds per turn, threads."""
    for name, kind, default, text in (
        ("rounds", positive, 7, "rounds"),
        ("seconds", float, 0.2, "length of a side's turn"),
        ("threads", positive, 2, "cores of the process, and threads of every side"),
    ):
        text = f"{text} (default {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)


def need(*modules: str) -> None:
    """Exit with one line if a package of the extra `experiments` is missing."""
    for name in modules:
        if find_spec(name) is None:
            sys.exit(f"needs {name}: pip install 'xnor-jax[experiments]'")


def versions(*others: str) -> str:
    """The packages' versions, with the instruction set of the cpu backend."""
    import xnor_jax
    from xnor_jax.ops import cpu

    engine = cpu.instruction_set() if cpu.is_available() else "no cpu backend"
    packages = [f"{name} {version(name)}" for name in ("jax", "jaxlib", *others)]
    ours = f"xnor_jax {xnor_jax.__version__} ({engine})"
    return ", ".join([ours, *packages, f"python {platform.python_version()}"])


def cpu_flags() -> set[str]:
    """The processor's feature flags from /proc/cpuinfo; empty if not x86."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = (line.split(":", 1)[1] for line in lines if line.startswith("flags"))
    return set(next(flags, "").split())


def describe_cpu() -> str:
    """The CPU's name, and the load average over the last minute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}; load over the last minute {os.getloadavg()[0]:.1f}"


def _repeat(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()
