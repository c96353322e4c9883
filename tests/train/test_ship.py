import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import nnx

from xnor_jax import data
from xnor_jax.packing import Info, Preprocessing
from xnor_jax.train import folder as folders
from xnor_jax.train import loop, ship
from xnor_jax.train import recipe as recipes
from xnor_jax.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def info():
    dataset = data.load("digits")
    return folders.RunInfo.of("mine", recipes.get("digits-lenet5"), dataset)


@pytest.fixture(scope="module")
def run(info, tmp_path_factory):
    """A run of two epochs without training; the first has the better accuracy."""
    folder = tmp_path_factory.mktemp("run") / "run"
    folders.open_folder(folder, info, resume=False)
    trainer, state = loop.create(info)
    checkpoints, history = Checkpoints(folder), []
    for epoch, accuracy in enumerate((0.75, 0.5), start=1):
        history.append({"test_accuracy": accuracy})
        checkpoints.save(epoch, state, history)
    return folder, trainer, state


@pytest.mark.slow
def test_packed_network_records_its_training_data(run, info):
    folder, trainer, state = run
    packed = ship.pack_run(folder)
    source = data.SOURCES["digits"]
    pixels = Preprocessing(source.mean, source.std)
    assert packed.info == Info("mine", pixels, info.class_names, 0.5, "digits")
    assert ship.pack_run(folder, best=True).info.test_accuracy == 0.75
    x = np.random.default_rng(0).normal(size=(3, 28, 28, 1)).astype(np.float32)
    model = nnx.merge(trainer.graphdef, state.params, state.rest)
    model.eval()
    np.testing.assert_allclose(packed(x), model(x), rtol=1e-4, atol=1e-5)


def test_unpackable_runs_are_refused(run, info, tmp_path):
    float_twin = dataclasses.replace(info.recipe, binary=False)
    twin = dataclasses.replace(info, recipe=float_twin)
    folders.open_folder(tmp_path / "twin", twin, resume=False)
    with pytest.raises(folders.RunError, match="float twin"):
        ship.pack_run(tmp_path / "twin")
    with pytest.raises(folders.RunError, match="no run in"):
        ship.pack_run(tmp_path)
    state, broken = run[2], tmp_path / "broken"
    folders.open_folder(broken, info, resume=False)
    nan = state._replace(params=jax.tree.map(lambda p: p * np.nan, state.params))
    checkpoints = Checkpoints(broken)
    checkpoints.save(1, nan, [{"test_accuracy": 0.1}])
    with pytest.raises(folders.RunError, match=re.escape(f"{broken} cannot be packed")):
        ship.pack_run(broken)
