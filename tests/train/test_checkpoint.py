import dataclasses
import json
import shutil
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


def moved(state, by):
    return state._replace(params=jax.tree.map(lambda leaf: leaf + by, state.params))


def record(accuracy):
    return {"test_accuracy": accuracy}


def save(folder, state, accuracies):
    """Save one epoch per accuracy, with the parameters moved by the epoch's number."""
    checkpoints, history = Checkpoints(folder), []
    for epoch, accuracy in enumerate(accuracies, start=1):
        history.append(record(accuracy))
        checkpoints.save(epoch, moved(state, epoch), history)
    return checkpoints


def kept(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_the_two_newest_and_the_best_are_kept_and_come_back_bit_for_bit(tmp_path):
    # NIN's state includes typed PRNG keys (dropout), which are not plain arrays.
    state = make("nin")
    accuracies = (0.5, 0.9, 0.7, 0.6, 0.8)
    checkpoints = save(tmp_path, state, accuracies)
    assert (checkpoints.newest(), checkpoints.best()) == (5, 2)
    assert kept(tmp_path) == {"2", "4", "5"}
    restored, history = Checkpoints(tmp_path).restore(4, state)
    assert history == list(map(record, accuracies[:4]))
    expected = moved(state, 4)
    chex.assert_trees_all_equal_structs(restored, expected)
    for new, old in zip(
        jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
            new, old = jax.random.key_data(new), jax.random.key_data(old)
        assert new.dtype == old.dtype
        chex.assert_trees_all_equal(new, old)


def test_of_equal_accuracies_the_last_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is checkpoints.best() is None
    checkpoints = save(tmp_path, make(), (0.5, 0.5, 0.4, 0.3))
    assert checkpoints.best() == 2
    assert kept(tmp_path) == {"2", "3", "4"}


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
    assert kept(folder) == {"1", "2", "3"}
    return folder, info, state


def damages(path):
    """Yield damaged contents: a flipped bit, cut short, longer; None for no file."""
    content = path.read_bytes()
    for at in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
        for bit in (0, 6):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            yield bytes(changed)
    yield from (b"", content[: len(content) // 2], content + b" ", None)


def files_of(folder, epoch):
    place = folder / "checkpoints" / str(epoch)
    return sorted(path for path in place.rglob("*") if path.is_file())


def damaged(path):
    """Yield once per kind of damage to the file, and restore it each time."""
    content = path.read_bytes()
    for damage in damages(path):
        path.unlink() if damage is None else path.write_bytes(damage)
        yield
        path.write_bytes(content)


def test_whatever_happens_to_a_file_the_epoch_before_is_taken(whole_run):
    folder, _, _ = whole_run
    checkpoints = Checkpoints(folder)
    files = files_of(folder, 3)
    assert len(files) > 5
    for path in files:
        for _ in damaged(path):
            with pytest.warns(RunWarning, match="epoch 3 .* epoch 2 is used") as said:
                assert checkpoints.newest() == 2
            assert len(said) == 1 and "\n" not in str(said[0].message)
    for path in files_of(folder, 1):
        for _ in damaged(path):
            with pytest.warns(RunWarning, match="epoch 1 .* epoch 3 is used"):
                assert checkpoints.best() == 3
    with warnings.catch_warnings(action="error"):
        assert (checkpoints.newest(), checkpoints.best()) == (3, 1)


@pytest.mark.slow
def test_a_run_is_read_and_packed_from_the_epoch_that_is_whole(whole_run):
    folder, info, state = whole_run
    path = files_of(folder, 3)[-1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    try:
        with pytest.warns(RunWarning, match="epoch 2 is used"):
            _, restored, history = loop.restore(folder, info)
        chex.assert_trees_all_equal(restored.params, moved(state, 2).params)
        assert history == [record(0.9), record(0.5)]
        with pytest.warns(RunWarning, match="epoch 2 is used"):
            assert ship.pack_run(folder).info.test_accuracy == 0.5
    finally:
        path.write_bytes(content)


def test_where_all_are_damaged_it_is_one_line_and_nothing_goes(whole_run, tmp_path):
    whole, info, _ = whole_run
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for number in (1, 2, 3):
        path = files_of(folder, number)[number]
        path.write_bytes(path.read_bytes()[1:])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for best in (False, True):
        with pytest.raises(RunError, match="epoch 3: .*; epoch 2: .*; epoch 1: ") as e:
            loop.restore(folder, info, best=best)
        assert "\n" not in str(e.value)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_epochs_after_the_one_that_was_taken_go(tmp_path):
    state = make()
    checkpoints = save(tmp_path, state, (0.8, 0.6, 0.7))
    for number in (2, 3):
        files_of(tmp_path, number)[0].unlink()
    with pytest.warns(RunWarning):
        assert checkpoints.newest() == 1
    checkpoints.save(2, moved(state, 9), [record(0.8), record(0.4)])
    assert kept(tmp_path) == {"1", "2"}
    restored, _ = checkpoints.restore(2, state)
    chex.assert_trees_all_equal(restored.params, moved(state, 9).params)


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path):
    state = make()
    checkpoints = save(tmp_path, state, (0.5,))
    for left in ("2.tmp", "1.old.tmp"):
        shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / left)
    assert checkpoints.newest() == 1
    checkpoints.save(2, state, [record(0.5), record(0.6)])
    assert kept(tmp_path) == {"1", "2"}


def test_another_network_is_one_line(tmp_path):
    checkpoints = save(tmp_path, make(), (0.5,))
    with pytest.raises(RunError, match="epoch 1 .* has shape") as error:
        checkpoints.restore(1, make(shape=(20, 20, 1)))
    assert "\n" not in str(error.value)


def test_every_file_has_a_checksum(tmp_path):
    save(tmp_path, make(), (0.5,))
    place = tmp_path / "checkpoints" / "1"
    checksums = json.loads((place / "checksums.json").read_text())
    names = {path.relative_to(place).as_posix() for path in files_of(tmp_path, 1)}
    assert set(checksums) == names - {"checksums.json"}
