"""Two devices, reproducible examples, and a counter of compilations."""

import gc
import os
import sys
import tempfile
from pathlib import Path

# Helper modules are beside the tests; pytest's import mode "importlib" adds no path.
sys.path.insert(0, str(Path(__file__).parent))

# Before JAX starts: sharding tests need more than one device where there is no GPU.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=2".strip()

# XLA's optimizations are off: tests mostly compile. `.ci/run` turns some back on.
_HURRY = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

_QUICK = []
if _HURRY:
    # XLA folds constants in an interpreter: seconds where kernels are constants.
    _QUICK = ["--xla_disable_hlo_passes=constant_folding"]
    if jax.__version_info__ < (0, 11):
        # XLA's older emitters compile twice as fast; later versions lack them.
        _QUICK.append("--xla_cpu_use_fusion_emitters=false")
for _flag in _QUICK:
    if _flag.partition("=")[0] not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {_flag}"

# Compiled programs leave many long-lived objects on the heap: collect rarely.
gc.set_threshold(200_000, 50, 1000)

# Tests often compile a program that another one has compiled. Each process has a cache
# of its own, because JAX's is not safe to write from several.
_programs = tempfile.TemporaryDirectory(prefix="xnor_jax-programs-")
jax.config.update("jax_compilation_cache_dir", _programs.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Most examples compile a program. `.ci/run` draws more: `--hypothesis-profile=ci`.
for _profile, _examples in (("few", 8), ("ci", 12)):
    hypothesis.settings.register_profile(
        _profile, deadline=None, derandomize=True, max_examples=_examples
    )
hypothesis.settings.load_profile("few")

_compiled: list[str] = []


def _on_event(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_on_event)


@pytest.fixture
def optimized():
    """Skip without XLA's optimizations: programs are slow and round differently."""
    if _HURRY:
        pytest.skip("needs optimized programs; set JAX_DISABLE_MOST_OPTIMIZATIONS=0")


@pytest.fixture
def compilations():
    """A function that returns how many programs XLA has compiled so far."""
    return lambda: len(_compiled)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Keep the cache that `datasets` makes of a test's images apart from the user's."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield
