"""Training with batches split over devices matches one device up to rounding."""

import dataclasses
import io

import chex
import jax
import numpy as np
import optax
import pytest
from commands import run_ok
from flax import nnx
from oracles import in_float64
from rich.console import Console

from xnor_jax import data
from xnor_jax.data import Dataset, Split, preprocess
from xnor_jax.train import api, loop, step
from xnor_jax.train import recipe as recipes
from xnor_jax.train.devices import constrain_batch, make_mesh, replicate
from xnor_jax.train.folder import RunInfo

IMAGES = 32


@pytest.fixture(scope="module")
def dataset():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, 16, 16, 1)).astype(np.uint8)
    split = Split(pixels, rng.integers(0, 10, IMAGES).astype(np.int32))
    return Dataset(split, split, tuple(map(str, range(10))), data.SOURCES["digits"])


def make_info(dataset, **fields):
    fields = {"batch_size": 8, "epochs": 2, **fields}
    recipe = dataclasses.replace(recipes.get("digits-lenet5"), **fields)
    return RunInfo.of("digits-lenet5", recipe, dataset)


def require_two_devices():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_steps_evaluation_and_calibration_match_one_device(dataset):
    """Compare in float64, where rounding flips no signs."""
    require_two_devices()
    with jax.enable_x64(True):
        check_steps(dataset)


def check_steps(dataset):
    trainer, initial = loop.create(make_info(dataset, calibration_batches=2))
    params, rest = in_float64((initial.params, initial.rest))
    # Nonzero biases: with few images, a BatchNorm's input (a multiple of α) may equal
    # its mean, and rounding would then decide the sign of its output.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + rng.normal(size=p.shape) / 10, params)
    opt_state = trainer.optimizer.init(params)
    initial = initial._replace(params=params, rest=rest, opt_state=opt_state)
    key, results = jax.random.key(3), []
    for devices in (1, 2):
        mesh = make_mesh(devices, 8)
        state = jax.tree.map(lambda leaf: leaf.copy(), initial)
        images, labels, state = replicate((*dataset.train, state), mesh)
        train = step.make_train_epoch(trainer, mesh=mesh)
        calibrate = step.make_calibrate(trainer, mesh=mesh)
        # A batch of 11 is not divisible by the number of devices.
        evaluate = step.make_evaluate(trainer, 11, mesh=mesh)
        rest = calibrate(state, images, key)
        test = evaluate(state._replace(rest=rest), images, labels)
        # One step: Adam normalizes the gradient, which amplifies its rounding errors.
        state, metrics, _ = train(state, images[:8], labels[:8], key)
        gradient = optax.tree.get(state.opt_state, "mu")
        statistics = nnx.state(state.rest, nnx.BatchStat)
        results.append((gradient, statistics, metrics, rest, test))
        for leaf in jax.tree.leaves(state):
            assert len(leaf.sharding.device_set) == devices
            assert leaf.sharding.is_fully_replicated
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_mixup_pairs_images_of_different_devices():
    require_two_devices()
    mesh = make_mesh(2, 8)
    images = jax.numpy.asarray(np.random.default_rng(0).normal(size=(8, 4, 4, 3)))

    @jax.jit
    def mixed(images):
        return preprocess.mixup(constrain_batch(images, mesh), jax.random.key(0))

    wanted, found = preprocess.mixup(images, jax.random.key(0)), mixed(images)
    assert len(found[0].sharding.device_set) == 2
    chex.assert_trees_all_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "float"])
def test_batch_is_split_over_devices(dataset, backend):
    require_two_devices()
    info = make_info(dataset)
    trainer, state = step.create(
        info.recipe,
        data.SOURCES["digits"],
        image_shape=info.image_shape,
        classes=10,
        steps_per_epoch=info.steps_per_epoch,
        backend=backend,
    )
    train = step.make_train_steps(trainer, mesh=(mesh := make_mesh(2, 8)))
    batches = np.arange(IMAGES).reshape(-1, 8)
    carry = state, step.zero_total(state)
    args = (carry, *dataset.train, batches, jax.random.key(0))
    carry, *args = replicate(args, mesh)
    program = train.lower(carry, 0, 4, *args).compile().as_text()
    # Each device's first convolution gets 4 of the batch's 8 images of 16×16.
    assert "f32[4,12,12,20]" in program
    assert "f32[8,12,12,20]" not in program
    assert "all-reduce" in program


@pytest.mark.slow
def test_run_resumes_on_another_number_of_devices(dataset, tmp_path, monkeypatch):
    require_two_devices()

    def train(folder, **options):
        console = Console(file=io.StringIO())
        # The float twin, because rounding may flip a sign in a binary network.
        info = make_info(dataset, binary=False)
        return loop.train(info, dataset, folder, console=console, **options)

    whole = train(tmp_path / "whole")
    record, calls = loop._record, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return record(*args)

    monkeypatch.setattr(loop, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", mesh=make_mesh(2, 8))
    monkeypatch.undo()
    resumed = train(tmp_path / "run", resume=True)
    assert [r["step"] for r in resumed.history] == [4, 8]
    for expected, found in zip(whole.history, resumed.history, strict=True):
        assert expected["train_loss"] == pytest.approx(found["train_loss"], rel=0.01)


def test_invalid_device_counts_and_batch_sizes_are_refused():
    require_two_devices()
    count = len(jax.devices())
    for devices in (0, count + 1):
        with pytest.raises(
            ValueError, match=rf"expected 1 to {count} \(.*got {devices}"
        ):
            make_mesh(devices, 8)
    with pytest.raises(ValueError, match="9 is not divisible by 2 .*: 8 and 10"):
        make_mesh(2, 9)
    assert make_mesh(1, 9) is None


def test_command_line_splits_batches_over_the_asked_devices(monkeypatch, capsys):
    require_two_devices()
    meshes = []
    monkeypatch.setattr(api, "train", lambda *_, mesh, **__: meshes.append(mesh))
    run_ok(capsys, "train", "--devices", 2)
    assert meshes == [make_mesh(2, 64)]
