"""The README's Python runs, and the first does what it says."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import xnor_jax as xnor

TEXT = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
def test_a_plain_flax_model_trains_in_under_30_lines():
    lines = [line for line in EXAMPLES[0].splitlines() if line.strip()]
    assert len(lines) < 30
    names: dict = {}
    exec(EXAMPLES[0], names)
    inner = [path for path, on in jax.tree.leaves_with_path(names["mask"]) if on]
    assert [xnor.masks.path_string(path) for path in inner] == ["conv2/kernel"]
    kernel = names["params"]["conv2"]["kernel"][...]
    assert float(jnp.abs(kernel).max()) <= 1
    binary = xnor.binarize(names["params"], names["mask"])
    model = nnx.merge(names["graph"], binary, names["rest"])
    model.eval()
    logits = model(names["x"].reshape(-1, 8, 8, 1) / 16)
    assert float(jnp.mean(logits.argmax(-1) == names["y"])) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(EXAMPLES)))
def test_other_examples_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they may write
    exec(EXAMPLES[number], {})
