"""The model of every recipe trains a step and packs, by command."""

import jax
import numpy as np
import pytest
from commands import run_ok
from flax import nnx
from folders import NAMES, draw

import xnor_jax as xnor
from xnor_jax import masks
from xnor_jax.train import folder, loop, step
from xnor_jax.train.recipe import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]

# The first recipe of each model, and the side of the images if 9 is too small.
RECIPES = {recipe.model: name for name, recipe in reversed(PRESETS.items())}
SIZES = {"lenet5": 16, "nin": 16, "alexnet": 67}
LAYERS = xnor.nn.BinaryConv | xnor.nn.BinaryLinear


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four training and three test pictures in class folders."""
    root = tmp_path_factory.mktemp("set")
    for number in range(7):
        place = root / ("train" if number < 4 else "validation") / NAMES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        draw(number, (80, 70)).save(place / f"{number}.png")
    return root


@pytest.mark.parametrize("model", xnor.models.MODELS)
def test_model_trains_a_step_and_packs(model, root, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "file"
    images = ("--dataset", "folder", "--image-size", SIZES.get(model, 9))
    # The first step of a warm-up has a learning rate of 0.
    options = ("--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0)
    options += ("--calibration-batches", 0)
    run_ok(
        *(capsys, "train", RECIPES[model], *images, *options),
        *("--data-dir", root, "--output", run),
    )
    info = folder.read_info(run)
    (_, first), (trainer, last, _) = loop.create(info), loop.restore(run, info)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(first.params),
        jax.tree.leaves(last.params),
        strict=True,
    ):
        name = masks.path_string(path)
        assert not name.endswith("kernel") or np.any(before != after), name
    run_ok(capsys, "pack", run, "-o", file)
    modules = nnx.iter_modules(step.trained_model(trainer, last))
    layers = sum(isinstance(module, LAYERS) for _, module in modules)
    rows = xnor.load(file).report.rows
    assert sum(row.kind == "binary" for row in rows) == layers > 1
    assert any(row.kind == "real" for row in rows)
