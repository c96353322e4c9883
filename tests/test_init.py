"""The modules that `import xnor_jax` loads, and use without the extra `train`."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import xnor_jax as xnor

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
# Modules that only the extra `train` installs. Flax installs orbax and rich, and optax
# installs absl.
ABSENT = ("datasets", "grain", "PIL", "sklearn", "tyro", "matplotlib", "tensorboardX")
WITHOUT_TRAIN = f"""
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {(*ABSENT, "chex", "pandas", "scipy.stats")!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(program, *args):
    """Run a program in a Python without the packages of the extra `train`."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TRAIN + program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_core_dependencies_exclude_the_train_extra():
    names = {line.partition(">")[0] for line in PROJECT["project"]["dependencies"]}
    assert names == {"jax", "flax", "optax", "numpy", "safetensors"}
    extras = PROJECT["project"]["optional-dependencies"]
    assert "xnor-jax[train]" in extras["test"]
    train = {line.partition(">")[0] for line in extras["train"]}
    assert {"tyro", "datasets", "grain", "pillow", "orbax-checkpoint"} <= train


def test_import_loads_only_the_standard_library():
    program = (
        "import sys; before = set(sys.modules); import xnor_jax; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    new = set(result.stdout.split()) - set(sys.stdlib_module_names)
    assert new == {"xnor_jax"}


@pytest.mark.slow
def test_core_api_works_without_the_train_extra(tmp_path):
    program = """
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
import xnor_jax as xnor

for name in set(xnor.__all__) - {"train", "data"}:
    getattr(xnor, name)
kernel = jax.random.normal(jax.random.key(0), (3, 3, 5, 7))
assert (jnp.sign(xnor.binarize(kernel)) == jnp.where(kernel < 0, -1, 1)).all()
layer = xnor.nn.BinaryConv(5, 7, (3, 3), rngs=nnx.Rngs(0))
assert layer(jnp.ones((1, 6, 6, 5))).shape == (1, 6, 6, 7)
model = xnor.models.LeNet5(rngs=nnx.Rngs(0))
model.eval()
model.eval()
packed = xnor.pack(model)
xnor.save(sys.argv[1], packed)
x = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
assert (xnor.load(sys.argv[1])(x) == packed(x)).all()
"""
    result = run(program, tmp_path / "net")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("args", [("train",), ("predict", "a", "b"), ("summary",)])
def test_missing_packages_are_reported_in_one_line(args):
    result = run("from xnor_jax.cli import main; main()", *args)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("xnor-jax: the package ")
    assert "pip install 'xnor-jax[train]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_needs_no_optional_packages():
    for args in (("--help",), ("--version",)):
        result = run("from xnor_jax.cli import main; main()", *args)
        assert (result.returncode, result.stderr) == (0, "") and result.stdout


def test_every_public_name_is_defined():
    assert set(xnor.__all__) <= set(dir(xnor))
    for name in xnor.__all__:
        assert getattr(xnor, name) is not None
    assert xnor.binarize is importlib.import_module("xnor_jax.weights").binarize
    with pytest.raises(AttributeError, match="binarise"):
        _ = xnor.binarise
