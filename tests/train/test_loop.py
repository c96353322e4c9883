"""Whole runs in process, of networks and data small enough for a test."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from xnor_jax import data
from xnor_jax.data import Dataset, Split
from xnor_jax.train import loop
from xnor_jax.train import recipe as recipes
from xnor_jax.train.folder import METRICS, RunError, RunInfo, RunWarning


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


@pytest.mark.slow
def test_a_network_with_dropout_trains(tmp_path):
    # Its state holds keys, which are no plain arrays.
    folder, way = tmp_path / "run", {"batch_size": 16, "calibration_batches": 0}
    result = run(folder, "cifar10-nin", (8, 8, 3), epochs=1, **way)
    assert [record["epoch"] for record in result.history] == [1]
    assert result.history[0]["step"] == 2
    assert len(result.history[0]["flip_ratios"]) == 7
    assert (folder / "report.png").exists() and (folder / "checkpoints" / "1").is_dir()


@pytest.mark.slow
def test_a_test_loss_that_is_not_finite_saves_nothing(tmp_path):
    # One step: the loss it reports is that of the weights before it.
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
def test_an_extended_run_is_one_that_was_as_long_from_the_start(tmp_path):
    args = "digits-lenet5", (16, 16, 1)
    fields = {"batch_size": 16, "schedule": "steps", "decay_epochs": (1, 2)}
    whole = run(tmp_path / "whole", *args, epochs=3, **fields).history
    run(tmp_path / "run", *args, epochs=1, **fields)
    again = run(tmp_path / "run", *args, epochs=3, resume=True, **fields).history
    numbers = set(METRICS) - {"images_per_second"}
    assert [[e[k] for k in numbers] for e in again] == [
        [e[k] for k in numbers] for e in whole
    ]


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_an_epoch_and_no_number(tmp_path):
    folder = tmp_path / "run"
    args = (folder, "digits-lenet5", (16, 16, 1))
    fields = {"epochs": 3, "batch_size": 16}
    whole = run(*args, **fields).history
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "st')
    newest = folder / "checkpoints" / "3" / "history.json"
    newest.write_bytes(newest.read_bytes().replace(b"3", b"7", 1))
    with pytest.warns(RunWarning, match="epoch 3 .* is damaged: .*epoch 2 is taken"):
        again = run(*args, **fields, resume=True).history
    numbers = set(METRICS) - {"images_per_second"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for here, there, line in zip(again, whole, lines, strict=True):
        assert all(here[key] == there[key] == json.loads(line)[key] for key in numbers)
