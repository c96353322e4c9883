"""Timings of a packed network beside the same network in floats.

XLA sets its number of threads once, when it starts, to the number of cores that the
process may run on. Each number of threads is therefore measured in a separate process,
in which the two networks run in turn.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np

from xnor_jax.ops import backends
from xnor_jax.packing.file import load
from xnor_jax.packing.unpacked import unpack

# Duration of one network's turn, unless a single call takes longer.
_SECONDS = 0.05


class Spread(NamedTuple):
    """A quantity's median over the rounds, with its extremes."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Result:
    """Timings for one number of threads and one batch size.

    Attributes:
      threads: Number of XLA's threads, one per core.
      batch_size: Images per call.
      packed: Seconds per call of the packed network.
      floats: Seconds per call of the same network in floats.
      ratio: Speedup of the packed network, computed in each round.
    """

    threads: int
    batch_size: int
    packed: Spread
    floats: Spread
    ratio: Spread


def thread_numbers() -> tuple[int, ...]:
    """The numbers of threads to measure: one, and one per core."""
    return tuple(sorted({1, len(_cores())}))


def measure(
    path: Path,
    threads: int,
    *,
    batch_sizes: Sequence[int],
    rounds: int,
    backend: str = "auto",
) -> list[Result]:
    """Time a file's network on this machine's CPU, in a separate process.

    Args:
      path: A file that `xnor_jax.save` wrote.
      threads: Number of XLA's threads, at most the cores of this process.
      batch_sizes: Images per call, each at least 1.
      rounds: Number of turns of each network, at least 1.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Returns:
      One result per batch size.

    Raises:
      OSError: If the process fails; the message has the last line of its stderr.
    """
    settings = {
        "path": str(path),
        "threads": threads,
        "batch_sizes": list(batch_sizes),
        "rounds": rounds,
        "backend": backend,
    }
    # PJRT_NPROC sets XLA's threads where a process cannot set its CPU affinity.
    own = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(threads)}
    process = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(settings)],
        env=os.environ | own,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        said = process.stderr.strip().splitlines() or [f"status {process.returncode}"]
        raise OSError(f"{path}: the measurement failed: {said[-1][:200]}")
    return [_result(found) for found in json.loads(process.stdout)]


def describe_backend(backend: str = "auto") -> str:
    """The backend that a name selects on this machine's CPU, and its instruction set.

    Raises:
      ValueError: If there is no such backend.
      RuntimeError: If it is not available.
    """
    backend = backends.resolve("bench", backend)
    if backend not in ("auto", "cpu"):
        return backend
    from xnor_jax.ops import cpu

    return f"cpu, {cpu.instruction_set()}"


def describe_cpu() -> str:
    """The processor's name, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def _measure_here(settings: dict[str, Any]) -> list[Result]:
    threads, backend = settings["threads"], settings["backend"]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores()[:threads])
    packed = load(settings["path"], backend=backend)
    results = []
    for batch_size in settings["batch_sizes"]:
        shape = (batch_size, *packed.image_shape)
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        x = jax.device_put(x)
        candidates = [
            _caller(unpack(packed, xla_conv=xla_conv), x) for xla_conv in (False, True)
        ]
        floats = min(candidates, key=lambda call: min(_seconds(call, 1, 3)))
        sides = _in_turn((_caller(packed, x), floats), settings["rounds"])
        ratio = [there / here for here, there in zip(*sides, strict=True)]
        spreads = [_spread(values) for values in (*sides, ratio)]
        results.append(Result(threads, batch_size, *spreads))
    return results


def _caller(network: Callable, x: jax.Array) -> Callable[[], Any]:
    """A call of the compiled network, with the weights as constants of the program."""
    compiled = jax.jit(lambda x: network(x))
    jax.block_until_ready(compiled(x))
    return lambda: jax.block_until_ready(compiled(x))


def _in_turn(sides: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds per call of each side in each round; every second round is reversed."""
    calls = [max(1, round(_SECONDS / min(_seconds(side, 1, 3)))) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for at in order:
            seconds[at] += _seconds(sides[at], calls[at], 1)
    return seconds


def _seconds(call: Callable[[], Any], calls: int, times: int) -> list[float]:
    """Seconds per call, averaged over `calls` calls and measured `times` times."""
    found = []
    for _ in range(times):
        begin = perf_counter()
        for _ in range(calls):
            call()
        found.append((perf_counter() - begin) / calls)
    return found


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def _result(found: dict[str, Any]) -> Result:
    spreads = (Spread(*found[name]) for name in ("packed", "floats", "ratio"))
    return Result(found["threads"], found["batch_size"], *spreads)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


if __name__ == "__main__":
    print(json.dumps([asdict(r) for r in _measure_here(json.loads(sys.argv[1]))]))
