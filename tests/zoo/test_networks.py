"""The zoo's networks: each loads and matches its card."""

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xnor_jax as xnor
from xnor_jax import data, zoo
from xnor_jax.train import predict
from xnor_jax.train.recipe import PRESETS

# The folder of each data set in the shared data.
SHARED = Path(__file__).parents[3] / "shared" / "data"
FOLDERS = {"mnist": "mnist", "fashion": "fashion_mnist", "cifar10": "cifar10"}


def test_cards_and_files_match():
    folder = Path(zoo.__file__).parent
    files = {path.stem for path in folder.glob("*.safetensors")}
    assert files == {*zoo.names()} >= {"digits-lenet5"}


@pytest.mark.parametrize("name", zoo.names())
def test_networks_match_their_cards(name):
    card, packed = zoo.card(name), zoo.load(name)
    assert card.name == packed.info.name == name
    assert card.bytes == zoo.find(name).stat().st_size < 2**18
    assert card.dataset == packed.info.dataset
    assert card.classes == packed.info.class_names
    assert card.test_accuracy == pytest.approx(packed.info.test_accuracy, abs=1e-7)
    assert card.license == "apache-2.0"
    program, train, recipe, *options = shlex.split(card.command)
    assert (program, train) == ("xnor-jax", "train") and recipe in PRESETS
    seed = options[options.index("--seed") + 1] if "--seed" in options else 0
    assert card.seed == int(seed)
    assert {row.kind for row in packed.report.rows} == {"real", "binary"}


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_card_accuracy_is_reproduced(name):
    card = zoo.card(name)
    folder = SHARED / FOLDERS[card.dataset] if card.dataset in FOLDERS else None
    if folder is not None and not folder.is_dir():
        pytest.skip(f"{card.dataset} is not in the shared data beside this checkout")
    dataset = data.load(card.dataset, folder)
    found = predict.evaluate(zoo.load(name), dataset).accuracy
    # Another processor may round the first layer differently, and change a class.
    assert found == pytest.approx(card.test_accuracy, abs=5e-4)


def test_unknown_network_error_lists_the_names():
    message = (
        "unknown network 'digit-lenet5'; expected one of .*digits-lenet5.*; did you"
    )
    for function in (zoo.load, zoo.card, xnor.zoo.load):
        with pytest.raises(ValueError, match=message):
            function("digit-lenet5")
    for name in ("../zoo/digits-lenet5", "", "digits-lenet5.json"):
        with pytest.raises(ValueError, match="unknown network"):
            zoo.load(name)


def test_load_accepts_a_backend():
    x = np.random.default_rng(1).normal(size=(3, 28, 28, 1)).astype(np.float32)
    packed = zoo.load("digits-lenet5", backend="xla")
    assert packed.backend == "xla" and packed(x).shape == (3, 10)
    with pytest.raises(ValueError, match="tpu"):
        zoo.load("digits-lenet5", backend="tpu")


def test_names_and_cards_need_no_jax():
    program = (
        "import sys, xnor_jax; assert 'xnor_jax.zoo' not in sys.modules;"
        "list(map(xnor_jax.zoo.card, xnor_jax.zoo.names()));"
        "assert not {'jax', 'huggingface_hub', 'tyro'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
