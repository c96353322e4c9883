"""Complete runs in this process, with small networks and data sets."""

import dataclasses
import io
import json
import math
import shutil
import zlib
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from xnor_jax import data, models, weights
from xnor_jax.data import Dataset, Split
from xnor_jax.train import loop, step
from xnor_jax.train import recipe as recipes
from xnor_jax.train.folder import METRICS, RunError, RunInfo, RunWarning, read_info


def run(folder, name, image_shape, *, images=32, resume=False, **fields):
    rng = np.random.default_rng(0)
    recipe = dataclasses.replace(recipes.get(name), **fields)
    pixels = rng.integers(0, 256, (images, *image_shape)).astype(np.uint8)
    split = Split(pixels, rng.integers(0, 10, images).astype(np.int32))
    names = tuple(map(str, range(10)))
    dataset = Dataset(split, split, names, data.SOURCES[recipe.dataset])
    info = RunInfo.of(name, recipe, dataset)
    console = Console(file=io.StringIO())
    return loop.train(info, dataset, folder, console=console, resume=resume)


# The state of dropout contains PRNG keys, which are not plain arrays.
LONG = {
    "model": partial(models.LeNet5, dropout=0.5),
    "batch_size": 16,
    "schedule": "steps",
    "decay_epochs": (1, 2),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return run(folder, "digits-lenet5", (16, 16, 1), epochs=3, **LONG)


def exact(record):
    return {key: record[key] for key in set(METRICS) - {"images_per_second"}}


@pytest.mark.slow
def test_nan_in_front_of_a_sign_is_an_error(tmp_path):
    """The sign of NaN is -1, so that the losses are finite."""
    options = {"epochs": 1, "batch_size": 16, "surrogate": lambda x, g: g * jnp.nan}
    with pytest.raises(RunError, match="after epoch 1, block2/layer/bias has .*NaN"):
        run(tmp_path / "run", "digits-lenet5", (28, 28, 1), **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_nonfinite_test_loss_saves_nothing(tmp_path):
    # One step: its training loss is that of the initial weights, which is finite.
    with pytest.raises(RunError, match="the test loss of epoch 1 is .*learning_rate"):
        run(
            tmp_path / "run",
            "digits-lenet5",
            (28, 28, 1),
            epochs=1,
            batch_size=32,
            learning_rate=1e38,
            binary=False,
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["epochs"] == 1


@pytest.mark.slow
def test_extended_run_matches_an_uninterrupted_one(whole, tmp_path):
    args = (tmp_path / "run", "digits-lenet5", (16, 16, 1))
    run(*args, epochs=1, **LONG)
    resumed = run(*args, epochs=3, resume=True, **LONG).history
    assert [*map(exact, resumed)] == [*map(exact, whole.history)]


@pytest.mark.slow
def test_run_resumes_an_epoch_before_a_damaged_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "st')
    newest = folder / "checkpoints" / "3" / "history.json"
    newest.write_bytes(newest.read_bytes().replace(b"3", b"7", 1))
    with pytest.warns(RunWarning, match="epoch 3 .* is damaged: .*epoch 2 is used"):
        args = (folder, "digits-lenet5", (16, 16, 1))
        resumed = run(*args, epochs=3, resume=True, **LONG).history
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for found, expected, line in zip(resumed, whole.history, lines, strict=True):
        assert exact(found) == exact(expected) == exact(json.loads(line))


@pytest.mark.slow
def test_initial_weights_and_teacher_come_from_another_run(tmp_path):
    args, fields = ("digits-lenet5", (16, 16, 1)), {"epochs": 1, "batch_size": 16}
    other = str(tmp_path / "twin")
    twin = run(tmp_path / "twin", *args, **fields, binary=False, calibration_batches=2)
    # The steps are too small to change a weight, so the initial weights remain.
    fields |= {"learning_rate": 1e-30, "calibration_batches": 2, "initial": other}
    fields |= {"teacher": other, "scale_minimum": 0.0}
    student = run(tmp_path / "student", *args, **fields)
    expected = weights.project(twin.state.params, student.trainer.inner)
    chex.assert_trees_all_close(student.state.params, expected, atol=1e-6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 16, 16, 1)), jnp.float32)
    teacher = step.trained_model(twin.trainer, twin.state)
    loaded = student.trainer.teacher
    assert loaded is not None
    np.testing.assert_array_equal(loaded(x), teacher(x))
    inputs = read_info(tmp_path / "student").inputs
    parts = ["training_labels", "test_labels", "training_images", "test_images"]
    assert list(inputs) == [*parts, "teacher"]
    kernels = map(np.asarray, jax.tree.leaves(twin.state.params))
    assert inputs["teacher"] == zlib.crc32(b"".join(k.tobytes() for k in kernels))
    logits, labels = jnp.ones((5, 10)), jnp.zeros(5, int)
    loss = step.batch_loss(student.trainer, x, logits, labels)
    np.testing.assert_allclose(loss, math.log(10), rtol=1e-5)
    fields |= {"model": "nin", "teacher": None}
    with pytest.raises(RunError, match="^initial: expected a run of the same network"):
        run(tmp_path / "nin", *args, **fields)
    assert not (tmp_path / "nin").exists()
    # Restoring does not load the teacher, which only training needs.
    trainer, state, _ = loop.restore(
        tmp_path / "student", read_info(tmp_path / "student")
    )
    assert trainer.teacher is None
    chex.assert_trees_all_equal(state.params, student.state.params)


@pytest.mark.parametrize("field", ["teacher", "initial"])
def test_missing_run_is_refused_before_anything_is_written(field, tmp_path):
    with pytest.raises(RunError, match=f"^{field}: no run in"):
        fields = {"batch_size": 16, field: str(tmp_path / "nowhere")}
        run(tmp_path / "run", "digits-lenet5", (16, 16, 1), **fields)
    assert not (tmp_path / "run").exists()
