"""Runs that read images from disk, compared with the same computation in memory."""

import dataclasses
import gc
import io
import os
import signal
import time
import weakref

import chex
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from xnor_jax import data
from xnor_jax.data import Augment, preprocess, streams
from xnor_jax.data.streams import grain
from xnor_jax.train import feeds, loop, step
from xnor_jax.train import recipe as recipes
from xnor_jax.train.devices import make_mesh, replicate
from xnor_jax.train.folder import RunError, RunInfo

pytestmark = pytest.mark.usefixtures("own_cache")

RECIPE = dataclasses.replace(
    recipes.get("folder-nin"),
    model="lenet5",
    image_size=16,
    batch_size=6,
    epochs=3,
    calibration_batches=2,
)
# Rounding cannot flip signs in the float twin, and Adam's steps are tiny at this rate.
FLOAT_RECIPE = dataclasses.replace(RECIPE, binary=False, learning_rate=1e-6)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = folders.class_folders(tmp_path_factory.mktemp("set"))
    return data.load("folder", folder, RECIPE.fit)


@pytest.fixture(scope="module")
def trainer_and_initial(dataset):
    """A trainer and a function that copies its initial state, which a step donates."""
    trainer, state = loop.create(RunInfo.of("mine", FLOAT_RECIPE, dataset))
    return trainer, lambda: jax.tree.map(lambda leaf: leaf.copy(), state)


def make_feed(trainer, dataset, mesh=None, done=0, workers=0):
    return feeds.make_feed(
        trainer, dataset, lambda *_: None, mesh=mesh, done=done, workers=workers
    )


def read(batches):
    with streams.reading(batches) as iterator:
        return [tuple(map(jnp.asarray, batch)) for batch in iterator]


@pytest.mark.slow
def test_epoch_matches_its_steps_and_evaluation_is_exact(dataset, trainer_and_initial):
    trainer, initial = trainer_and_initial
    with make_feed(trainer, dataset) as feed:
        trained, metrics, flips = feed.train_epoch(initial(), 1)
        rest = feed.calibrate(trained)
        test = feed.evaluate(trained)
        assert int(trained.step) == 3
        again, _, _ = feed.train_epoch(trained, 2)
    assert int(again.step) == 6
    expected, per_step = initial(), []
    train = jax.jit(step.train_step, static_argnums=0)
    batches = dataset.train_batches(6, seed=0, augment=Augment(True, 0, True))
    for images, labels in read(batches):
        x = preprocess.normalize(trainer.source, images)
        expected, *step_metrics = train(Static(trainer), expected, x, labels)
        per_step.append(step_metrics)
    means = jax.tree.map(lambda *x: sum(x) / 3, *per_step)
    chex.assert_trees_all_close([metrics, flips], means, rtol=1e-3, atol=1e-4)
    images, labels = next(dataset.test_splits())
    assert len(labels) == 7  # one full batch and one image
    in_memory = step.make_evaluate(trainer)(
        expected, jnp.asarray(images), jnp.asarray(labels)
    )
    chex.assert_trees_all_close(test, in_memory, rtol=1e-3)
    found = [
        step.batch_statistics(trainer, expected, images)
        for images, _ in read(dataset.calibration_batches(6, count=2, seed=0))
    ]
    statistics = step.merge_statistics(expected.rest, found)
    chex.assert_trees_all_close(rest, statistics, rtol=1e-3, atol=1e-3)


class Static:
    """Make a trainer a hashable static argument; its trees are not hashable."""

    def __init__(self, trainer):
        self._trainer = trainer

    def __getattr__(self, name):
        return getattr(self._trainer, name)


@pytest.mark.slow
def test_two_devices_share_each_batch(dataset, trainer_and_initial):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    trainer, initial = trainer_and_initial
    results = []
    for mesh in (None, make_mesh(2, 6)):
        with make_feed(trainer, dataset, mesh) as feed:
            state, metrics, _ = feed.train_epoch(replicate(initial(), mesh), 1)
            state = state._replace(rest=feed.calibrate(state))
            results.append((metrics, feed.evaluate(state)))
        for leaf in jax.tree.leaves(state):
            assert len(leaf.sharding.device_set) == (1 if mesh is None else 2)
    chex.assert_trees_all_close(*results, rtol=1e-3)


@pytest.mark.slow
def test_resumed_run_matches_an_uninterrupted_one(dataset, tmp_path, monkeypatch):
    info = RunInfo.of("mine", RECIPE, dataset)

    def train(folder, **options):
        console = Console(file=io.StringIO(), width=200)
        loop.train(info, dataset, folder, console=console, **options)
        _, state, history = loop.restore(folder, info)
        return state, history, console.file.getvalue()

    whole, records, _ = train(tmp_path / "whole")
    record, calls = loop._record, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return record(*args)

    monkeypatch.setattr(loop, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", workers=1)
    monkeypatch.undo()
    resumed, again, _ = train(tmp_path / "run", resume=True)
    chex.assert_trees_all_equal(resumed, whole)
    for found, expected in zip(again, records, strict=True):
        assert 0 <= found.pop("data_wait") <= 1 and 0 <= expected.pop("data_wait") <= 1
        del found["images_per_second"], expected["images_per_second"]
        assert found == expected
    done, _, _ = train(tmp_path / "run", resume=True)  # nothing is left to do
    chex.assert_trees_all_equal(done, whole)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all('"data_wait"' in line for line in lines)


def slow_batches(seconds):
    def prepare(number):
        time.sleep(seconds)
        return np.full((2,), number)

    return grain.MapDataset.range(4).map(prepare)


@pytest.mark.slow
def test_waiting_time_excludes_computation():
    @jax.jit
    def compute(x):
        return jax.lax.fori_loop(0, 60, lambda _, a: jnp.sin(a @ a), x).sum()

    x = jnp.ones((500, 500))
    jax.block_until_ready(compute(x))
    for pause, low, high in ((0.0, 0.0, 0.2), (0.5, 0.4, 2.2)):
        with feeds.Prefetcher(slow_batches(pause)) as prefetcher:
            running, numbers = None, []
            for _ in range(4):
                numbers.append(int(prefetcher.take(running)[0]))
                running = compute(x)
                jax.block_until_ready(running)
        assert numbers == [0, 1, 2, 3]
        assert low <= prefetcher.waited <= high


@pytest.mark.slow
def test_prefetcher_frees_its_iterator_on_exit():
    """The iterator is freed even if asyncio, after an interrupt, refers to the feed."""
    with feeds.Prefetcher(slow_batches(0), workers=1) as prefetcher:
        prefetcher.take(None)
        iterator = weakref.ref(prefetcher._iterator)
    gc.collect()
    assert iterator() is None


def test_read_error_is_raised_and_ends_the_thread(dataset):
    def broken(number):
        raise data.DataError(f"picture {number} is none")

    with (
        pytest.raises(data.DataError, match="picture 0"),
        feeds.Prefetcher(grain.MapDataset.range(4).map(broken)) as prefetcher,
    ):
        prefetcher.take(None)
    with pytest.raises(RuntimeError):
        prefetcher._pool.submit(print)


def test_error_without_a_message_shows_its_type():
    def broken(_):
        raise RuntimeError

    with (
        pytest.raises(RunError, match="read more images: RuntimeError; .*--resume"),
        feeds.Prefetcher(grain.MapDataset.range(4).map(broken)) as prefetcher,
    ):
        prefetcher.take(None)


@pytest.mark.slow
def test_killed_worker_is_a_one_line_error():
    def killed(_):
        os.kill(os.getpid(), signal.SIGKILL)

    batches = grain.MapDataset.range(4).map(killed)
    with (
        pytest.raises(RunError, match="exit code -9.*--resume") as error,
        feeds.Prefetcher(batches, workers=1) as prefetcher,
    ):
        prefetcher.take(None)
    assert "\n" not in str(error.value)
