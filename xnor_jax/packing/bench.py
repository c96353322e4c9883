"""How fast a packed network runs, beside the same network in floats.

XLA takes its number of threads from the processor cores that the process may run on,
once, when it starts: every number of threads is measured in a process of its own. There
the two networks run in turn.
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

# How long one side's turn lasts, unless a single call is longer.
_SECONDS = 0.05


class Spread(NamedTuple):
    """A quantity's median over the rounds, with its extremes."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Result:
    """One number of threads and one batch size.

    Attributes:
      threads: Of XLA, each on a core of its own.
      batch_size: Images a call.
      packed: Seconds a call of the packed network.
      floats: Seconds a call of the same network in floats.
      ratio: How many times quicker the packed one was, round by round.
    """

    threads: int
    batch_size: int
    packed: Spread
    floats: Spread
    ratio: Spread


def thread_numbers() -> tuple[int, ...]:
    """One and all: how many threads to measure with."""
    return tuple(sorted({1, len(_cores())}))


def measure(
    path: Path,
    threads: int,
    *,
    batch_sizes: Sequence[int],
    rounds: int,
    backend: str = "auto",
) -> list[Result]:
    """Time a file's network on this machine's CPU, in a process of its own.

    Args:
      path: A file that `xnor_jax.save` wrote.
      threads: At most as many as this process has cores.
      batch_sizes: Images a call, each at least 1.
      rounds: How often each side has its turn, at least 1.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Returns:
      One result a batch size.

    Raises:
      OSError: If the process fails; the message has the last line that it said.
    """
    order = {
        "path": str(path),
        "threads": threads,
        "batch_sizes": list(batch_sizes),
        "rounds": rounds,
        "backend": backend,
    }
    # PJRT_NPROC is XLA's own word where a process cannot choose its cores.
    own = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(threads)}
    process = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(order)],
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
    """What a backend's name stands for on this machine's CPU, with its instructions.

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
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor() or platform.machine()


def _measure_here(order: dict[str, Any]) -> list[Result]:
    threads, backend = order["threads"], order["backend"]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores()[:threads])
    packed = load(order["path"], backend=backend)
    results = []
    for batch_size in order["batch_sizes"]:
        shape = (batch_size, *packed.image_shape)
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        x = jax.device_put(x)
        candidates = [
            _caller(unpack(packed, xla_conv=xla_conv), x) for xla_conv in (False, True)
        ]
        floats = min(candidates, key=lambda call: min(_seconds(call, 1, 3)))
        sides = _in_turn((_caller(packed, x), floats), order["rounds"])
        ratio = [there / here for here, there in zip(*sides, strict=True)]
        spreads = [_spread(values) for values in (*sides, ratio)]
        results.append(Result(threads, batch_size, *spreads))
    return results


def _caller(network: Callable, x: jax.Array) -> Callable[[], Any]:
    """A call of the compiled network, its weights inside the program."""
    compiled = jax.jit(lambda x: network(x))
    jax.block_until_ready(compiled(x))
    return lambda: jax.block_until_ready(compiled(x))


def _in_turn(sides: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds a call of each side in each round; every second one runs backwards."""
    calls = [max(1, round(_SECONDS / min(_seconds(side, 1, 3)))) for side in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for at in order:
            seconds[at] += _seconds(sides[at], calls[at], 1)
    return seconds


def _seconds(call: Callable[[], Any], calls: int, times: int) -> list[float]:
    """Seconds a call, taken over `calls` of them, a number of times."""
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
