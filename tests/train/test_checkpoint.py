import dataclasses

import chex
import jax
import pytest

from xnor_jax.data import SOURCES
from xnor_jax.train import recipe as recipes
from xnor_jax.train import step
from xnor_jax.train.checkpoint import Checkpoints
from xnor_jax.train.folder import RunError


def make(model="lenet5", shape=(16, 16, 1)):
    recipe = dataclasses.replace(recipes.get("digits-lenet5"), model=model)
    return step.create(
        recipe, SOURCES["digits"], image_shape=shape, classes=3, steps_per_epoch=1
    )[1]


def record(accuracy):
    return {"test_accuracy": accuracy}


def test_newest_and_best_are_kept_and_come_back_bit_for_bit(tmp_path):
    # NIN's state has what is hard to store: typed keys of the dropout.
    state = make("nin")
    checkpoints = Checkpoints(tmp_path)
    history = []
    for epoch, accuracy in enumerate((0.5, 0.9, 0.7, 0.6), start=1):
        params = jax.tree.map(lambda x, e=epoch: x + e, state.params)
        history.append(record(accuracy))
        checkpoints.save(epoch, state._replace(params=params), history)
    assert (checkpoints.newest(), checkpoints.best()) == (4, 2)
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"2", "4"}
    restored, read = Checkpoints(tmp_path).restore(4, state)
    assert read == history
    expected = state._replace(params=jax.tree.map(lambda x: x + 4, state.params))
    chex.assert_trees_all_equal_structs(restored, expected)
    for new, old in zip(
        jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True
    ):
        if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
            new, old = jax.random.key_data(new), jax.random.key_data(old)
        assert new.dtype == old.dtype
        chex.assert_trees_all_equal(new, old)


def test_damaged_checkpoint_and_another_network_are_one_line(tmp_path):
    state = make()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, [record(0.5)])
    with pytest.raises(RunError, match="epoch 1") as error:
        checkpoints.restore(1, make(shape=(20, 20, 1)))
    assert "\n" not in str(error.value)
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RunError, match="cannot read the checkpoint") as error:
        Checkpoints(tmp_path).restore(1, state)
    assert "\n" not in str(error.value)
