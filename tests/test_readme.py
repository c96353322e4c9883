"""The Python examples of README and docs run, and the README's links are valid."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import xnor_jax as xnor

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def examples(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


EXAMPLES = examples(TEXT)
# Examples other than the first; the docs build executes the docs' cells.
OTHERS = [
    pytest.param(example, id=f"{path.stem}{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for number, example in enumerate(examples(path.read_text()))
    if example != EXAMPLES[0]
]


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
@pytest.mark.parametrize("example", OTHERS)
def test_other_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files here
    exec(example, {})


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT)
    local = [link for link in links if "://" not in link]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_readme_starts_with_train_and_test_commands():
    block = re.search(r"```bash\n(.*?)```", TEXT, re.DOTALL)[1]
    run, test = block.splitlines()
    assert "xnor-jax train" in run and "pytest" in test
