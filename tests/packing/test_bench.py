"""The mechanics of the benchmark; no test asserts a speed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import packed_networks
import pytest
from flax import nnx

import xnor_jax as xnor
from xnor_jax.packing import bench

# Prints the number of cores, and of threads in XLA's pool after XLA has run.
PROGRAM = """
from pathlib import Path
from xnor_jax.packing import bench
results = bench._measure_here({settings})
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
print(len(bench._cores()), sum("XLAEigen" in name for name in names))
for result in results:
    print(result.threads, result.batch_size)
    for spread in (result.packed, result.floats, result.ratio):
        assert 0 < spread.least <= spread.median <= spread.most < 1000
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "net.safetensors"
    xnor.save(
        path,
        xnor.pack(packed_networks.randomized(nnx.eval_shape(packed_networks.tiny))),
    )
    return path


def test_failed_process_is_reported_in_one_line(monkeypatch):
    process = subprocess.CompletedProcess([], 1, "", "Traceback …\nError: no memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: process)
    with pytest.raises(OSError, match="the measurement failed: Error: no memory$"):
        bench.measure(Path("file"), 1, batch_sizes=(1,), rounds=1)


def test_timed_functions_alternate_in_order(monkeypatch):
    monkeypatch.setattr(bench, "_SECONDS", 1e-9)
    calls = []

    def recorder(name):
        def call():
            calls.append(name)
            time.sleep(0.01)

        return call

    seconds = bench._in_turn((recorder("a"), recorder("b")), 3)
    assert np.shape(seconds) == (2, 3) and np.min(seconds) >= 0.01
    assert "".join(calls)[-6:] == "abbaab"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_timings_use_the_requested_thread_count(file):
    settings = {
        "path": str(file),
        "threads": 1,
        "batch_sizes": [1, 3],
        "rounds": 2,
        "backend": "auto",
    }
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(settings=settings)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.splitlines() == ["1 1", "1 1", "1 3"]


def test_backend_and_cpu_are_described():
    assert bench.describe_backend("xla") == "xla"
    assert bench.describe_backend("auto") in (
        "xla",
        *(f"cpu, {name}" for name in ("avx512", "avx2", "neon", "portable")),
    )
    assert bench.describe_cpu()
    with pytest.raises(ValueError, match="tpu"):
        bench.describe_backend("tpu")
