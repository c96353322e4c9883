import dataclasses
import json
import shutil
import subprocess
import sys
import warnings

import chex
import jax
import pytest

from xnor_jax.data import SOURCES
from xnor_jax.train import folder as folders
from xnor_jax.train import loop, ship, step
from xnor_jax.train import recipe as recipes
from xnor_jax.train.checkpoint import Checkpoints
from xnor_jax.train.folder import RunError, RunInfo, RunWarning


def make(model="lenet5", shape=(16, 16, 1)):
    recipe = dataclasses.replace(recipes.get("digits-lenet5"), model=model)
    return step.create(
        recipe, SOURCES["digits"], image_shape=shape, classes=3, steps_per_epoch=1
    )[1]


def with_offset(state, offset):
    return state._replace(params=jax.tree.map(lambda leaf: leaf + offset, state.params))


def record(accuracy):
    return {"test_accuracy": accuracy}


def save(folder, state, accuracies):
    """Save one epoch per accuracy, with the parameters moved by the epoch's number."""
    checkpoints, history = Checkpoints(folder), []
    for epoch, accuracy in enumerate(accuracies, start=1):
        history.append(record(accuracy))
        checkpoints.save(epoch, with_offset(state, epoch), history)
    return checkpoints


def kept_epochs(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_newest_two_and_best_are_kept_and_restored_exactly(tmp_path):
    # NIN's state includes typed PRNG keys (dropout), which are not plain arrays.
    state = make("nin")
    accuracies = (0.5, 0.9, 0.7, 0.6, 0.8)
    checkpoints = save(tmp_path, state, accuracies)
    assert (checkpoints.newest(), checkpoints.best()) == (5, 2)
    assert kept_epochs(tmp_path) == {"2", "4", "5"}
    shapes = jax.eval_shape(lambda: state)
    restored, history = Checkpoints(tmp_path).restore(4, shapes)
    assert history == list(map(record, accuracies[:4]))
    expected = with_offset(state, 4)
    chex.assert_trees_all_equal_structs(restored, expected)
    for new, old in zip(
        jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
            new, old = jax.random.key_data(new), jax.random.key_data(old)
        assert new.dtype == old.dtype
        chex.assert_trees_all_equal(new, old)


def test_best_is_the_last_of_equal_accuracies(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is checkpoints.best() is None
    checkpoints = save(tmp_path, make(), (0.5, 0.5, 0.4, 0.3))
    assert checkpoints.best() == 2
    assert kept_epochs(tmp_path) == {"2", "3", "4"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of three epochs without training; the first has the best accuracy."""
    folder = tmp_path_factory.mktemp("run") / "run"
    recipe = dataclasses.replace(recipes.get("digits-lenet5"), epochs=3)
    info = RunInfo("mine", recipe, SOURCES["digits"], (16, 16, 1), ("a", "b", "c"), 64)
    folders.open_folder(folder, info, resume=False)
    state = loop.create(info)[1]
    save(folder, state, (0.9, 0.5, 0.7))
    folders.write_metrics(folder, [])
    assert kept_epochs(folder) == {"1", "2", "3"}
    return folder, info, state


def damaged_contents(path):
    """Yield damaged contents: a flipped bit, cut short, longer; None for no file."""
    content = path.read_bytes()
    for position in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
        for bit in (0, 6):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            yield bytes(changed)
    yield from (b"", content[: len(content) // 2], content + b" ", None)


def checkpoint_files(folder, epoch):
    directory = folder / "checkpoints" / str(epoch)
    return sorted(path for path in directory.rglob("*") if path.is_file())


def each_damage(path):
    """Yield once per kind of damage to the file, and restore it each time."""
    content = path.read_bytes()
    for damage in damaged_contents(path):
        path.unlink() if damage is None else path.write_bytes(damage)
        yield
        path.write_bytes(content)


def test_damaged_checkpoint_falls_back_to_another_epoch(whole_run):
    folder, _, _ = whole_run
    checkpoints = Checkpoints(folder)
    files = checkpoint_files(folder, 3)
    assert len(files) > 5
    for path in files:
        for _ in each_damage(path):
            with pytest.warns(RunWarning, match="epoch 3 .* epoch 2 is used") as caught:
                assert checkpoints.newest() == 2
            assert len(caught) == 1 and "\n" not in str(caught[0].message)
    for path in checkpoint_files(folder, 1):
        for _ in each_damage(path):
            with pytest.warns(RunWarning, match="epoch 1 .* epoch 3 is used"):
                assert checkpoints.best() == 3
    with warnings.catch_warnings(action="error"):
        assert (checkpoints.newest(), checkpoints.best()) == (3, 1)


@pytest.mark.slow
def test_damaged_run_is_restored_and_packed_from_an_intact_epoch(whole_run):
    folder, info, state = whole_run
    path = checkpoint_files(folder, 3)[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    try:
        with pytest.warns(RunWarning, match="epoch 2 is used"):
            _, restored, history = loop.restore(folder, info)
        chex.assert_trees_all_equal(restored.params, with_offset(state, 2).params)
        assert history == [record(0.9), record(0.5)]
        with pytest.warns(RunWarning, match="epoch 2 is used"):
            assert ship.pack_run(folder).info.test_accuracy == 0.5
    finally:
        path.write_bytes(content)


def test_no_intact_checkpoint_is_one_line_and_deletes_nothing(whole_run, tmp_path):
    whole, info, _ = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for number in (1, 2, 3):
        path = checkpoint_files(folder, number)[number]
        path.write_bytes(path.read_bytes()[1:])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for best in (False, True):
        with pytest.raises(RunError, match="epoch 3: .*; epoch 2: .*; epoch 1: ") as e:
            loop.restore(folder, info, best=best)
        assert "\n" not in str(e.value)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_save_removes_later_damaged_epochs(tmp_path):
    state = make()
    checkpoints = save(tmp_path, state, (0.8, 0.6, 0.7))
    for number in (2, 3):
        checkpoint_files(tmp_path, number)[0].unlink()
    with pytest.warns(RunWarning):
        assert checkpoints.newest() == 1
    checkpoints.save(2, with_offset(state, 9), [record(0.8), record(0.4)])
    assert kept_epochs(tmp_path) == {"1", "2"}
    restored, _ = checkpoints.restore(2, state)
    chex.assert_trees_all_equal(restored.params, with_offset(state, 9).params)


def test_partial_writes_of_a_killed_process_are_ignored(tmp_path):
    state = make()
    checkpoints = save(tmp_path, state, (0.5,))
    for leftover in ("2.tmp", "1.old.tmp"):
        shutil.copytree(
            tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / leftover
        )
    assert checkpoints.newest() == 1
    checkpoints.save(2, state, [record(0.5), record(0.6)])
    assert kept_epochs(tmp_path) == {"1", "2"}


def test_restoring_another_network_is_one_line(tmp_path):
    checkpoints = save(tmp_path, make(), (0.5,))
    with pytest.raises(RunError, match="epoch 1 .* has shape") as error:
        checkpoints.restore(1, make(shape=(20, 20, 1)))
    assert "\n" not in str(error.value)


def test_every_file_has_a_checksum(tmp_path):
    save(tmp_path, make(), (0.5,))
    directory = tmp_path / "checkpoints" / "1"
    checksums = json.loads((directory / "checksums.json").read_text())
    names = {
        path.relative_to(directory).as_posix() for path in checkpoint_files(tmp_path, 1)
    }
    assert set(checksums) == names - {"checksums.json"}


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from xnor_jax.train.checkpoint import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
noise = np.random.default_rng(0).normal(size=(60, 40_000))
try:
    Checkpoints(Path(sys.argv[1])).save(1, dict(enumerate(noise)), [])
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_threads_of_a_failed_save_print_nothing(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stderr == "" and "cannot save epoch 1 in" in found.stdout
