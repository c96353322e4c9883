"""User-defined recipes, run from Python and from the command line."""

import dataclasses
import functools
import hashlib
import importlib
import io
import json
import math
import re
import shutil
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from commands import run_cli, run_failing, run_ok
from flax import nnx
from PIL import Image
from rich.console import Console

import xnor_jax as xnor
from xnor_jax import data, registry
from xnor_jax.train import custom, network, ship
from xnor_jax.train import folder as folders
from xnor_jax.train import recipe as recipes
from xnor_jax.train.recipe import Recipe, RecipeError

SOURCE = """
    import jax.numpy as jnp, numpy as np, optax, xnor_jax as xnor
    from flax import nnx


    class Net(xnor.nn.Layered):
        def __init__(
            self, *, image_shape, classes, rngs, rule, surrogate, binary=True, width=8
        ):
            self.image_shape = image_shape
            size = image_shape[0] * image_shape[1] * image_shape[2]
            options = {"rule": rule, "surrogate": surrogate, "binary": binary}
            self.dense1 = nnx.Linear(size, width, rngs=rngs)
            self.block2 = xnor.nn.XnorBlock(width, 12, rngs=rngs, **options)
            self.dense3 = nnx.Linear(12, classes, rngs=rngs)

        def layers(self):
            return xnor.nn.Flatten(), self.dense1, self.block2, self.dense3


    def images():
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 3, 88)
        pixels = rng.integers(0, 100, (88, 5, 6, 1)) + 70 * labels[:, None, None, None]
        pixels = pixels.astype(np.uint8)
        return pixels[:64], labels[:64], pixels[64:], labels[64:]


    def rule(kernel, grad):
        return grad * (1 - jnp.tanh(kernel) ** 2)


    def surrogate(x, grad):
        return grad * jnp.exp(-(x**2))


    def schedule(learning_rate, steps_per_epoch, epochs):
        return optax.linear_schedule(learning_rate, 0.001, steps_per_epoch * epochs)


    RECIPE = xnor.train.Recipe(
        dataset=images,
        model=Net,
        rule=rule,
        surrogate=lambda x, grad: surrogate(x, grad),
        optimizer=lambda learning_rate: optax.lion(learning_rate, weight_decay=0.0),
        schedule=schedule,
        learning_rate=0.01,
        epochs=2,
        batch_size=16,
    )
    OTHER = 3
"""
module_numbers = iter(range(1000))


def metrics(folder):
    keys = set(folders.METRICS) - {"images_per_second"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in keys} for line in lines]


def unload(monkeypatch, module):
    """Make the next import read the file again, as in a new process."""
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.invalidate_caches()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run of a recipe, and the name of the recipe's module."""
    folder = tmp_path_factory.mktemp("own")
    module = f"own_{next(module_numbers)}"
    (folder / f"{module}.py").write_text(textwrap.dedent(SOURCE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.chdir(folder)
        return xnor.train.run(f"{module}:RECIPE", output=folder / "run"), module


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    """Copy the run and its module to a new working directory, without importing it."""
    run, module = trained
    shutil.copytree(run.folder, tmp_path / "run")
    shutil.copy(run.folder.parent / f"{module}.py", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    unload(monkeypatch, module)
    return module


@pytest.fixture
def recipe(trained):
    return sys.modules[trained[1]].RECIPE


@pytest.mark.slow
def test_other_commands_work_with_a_custom_recipe(trained, copied, tmp_path, capsys):
    last, name = trained[0].history[-1], f"{copied}:RECIPE"
    out = run_ok(capsys, "evaluate", "run")
    assert out.startswith(f"{name}, epoch 2: 24 test images")
    assert out.endswith(f"test accuracy {last['test_accuracy']:.2%}\n")
    out = run_ok(capsys, "pack", "run", "-o", "own.xnor")
    assert "1 of 3 binary" in out
    packed = xnor.load("own.xnor")
    x = np.random.default_rng(1).normal(size=(7, 5, 6, 1)).astype(np.float32)
    np.testing.assert_allclose(packed(x), trained[0].model(x), rtol=1e-4, atol=1e-4)
    Image.fromarray(sys.modules[copied].images()[2][0, :, :, 0]).save("one.png")
    assert "one.png: " in run_ok(capsys, "predict", "own.xnor", "one.png")
    out = run_ok(capsys, "summary", name)
    assert f"{copied}:Net" in out and "1 of 3 kernels binary" in out


@pytest.mark.slow
def test_recipe_json_records_custom_parts(trained):
    run, module = trained
    fields = json.loads((run.folder / "recipe.json").read_text())
    assert fields["name"] == f"{module}:RECIPE"
    assert fields["model"] == f"{module}:Net"
    assert fields["rule"] == f"{module}:rule"
    assert fields["surrogate"] == f"{module}:<lambda>"
    source = (run.folder.parent / f"{module}.py").read_bytes()
    assert fields["modules"] == {module: hashlib.sha256(source).hexdigest()}
    info = folders.read_info(run.folder)
    assert info.recipe == sys.modules[module].RECIPE
    pixels = sys.modules[module].images()[0] / 255
    np.testing.assert_allclose(info.source.mean, pixels.mean(), rtol=1e-6)
    np.testing.assert_allclose(info.source.std, pixels.std(), rtol=1e-6)
    assert ship.why_not_packable(info) is None
    best = max(epoch["test_accuracy"] for epoch in run.history)
    model = xnor.train.load(run, best=True)
    x, labels = sys.modules[module].images()[2:]
    x = data.preprocess.normalize(info.source, jnp.asarray(x))
    right = model(x).argmax(-1) == labels  # type: ignore[operator]
    np.testing.assert_allclose(right.mean(), best, rtol=1e-6)


@pytest.mark.slow
def test_interrupted_seeds_resume_to_identical_metrics(
    trained, copied, tmp_path, capsys
):
    class Interrupted(Console):
        def print(self, *objects, **_):
            if str(objects[0]).startswith("epoch   1"):
                raise KeyboardInterrupt

    console, output = Interrupted(file=io.StringIO()), tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        xnor.train.run_seeds(
            f"{copied}:RECIPE", np.array([0, 5]), output=output, console=console
        )
    assert len(metrics(output / "seed0")) == 1
    out = run_ok(capsys, "train", "--resume", "--output", output)
    assert metrics(output / "seed0") == metrics(trained[0].folder)
    fields = json.loads((output / "seed5" / "recipe.json").read_text())
    assert fields["seed"] == 5
    last = [metrics(output / f"seed{seed}")[-1]["test_accuracy"] for seed in (0, 5)]
    last_accuracy = f"accuracy {np.mean(last):.2%} ± {np.std(last, ddof=1):.2%}"
    accuracy_range = f"({min(last):.2%} to {max(last):.2%}) in the last epoch"
    assert f"{last_accuracy} {accuracy_range}" in out.splitlines()[-1]
    code, err = run_failing(
        capsys, "train", "--resume", "--output", output, "--seed", 1
    )
    assert code == 2 and "--seed: expected none; " in err
    args = (f"{copied}:RECIPE", "--output", output, "--seeds", 0, 5, 5)
    code, err = run_failing(capsys, "train", *args)
    assert code == 2 and "--seeds: expected at least one seed, without dup" in err


@pytest.mark.slow
def test_changed_module_is_noted_and_missing_module_is_refused(
    copied, tmp_path, capsys, monkeypatch
):
    file, name = tmp_path / f"{copied}.py", f"{copied}:RECIPE"
    resume = ("train", name, "--resume", "--output", "run")
    file.write_text(file.read_text() + "\n# changed\n")
    for command in (("evaluate", "run"), ("pack", "run", "-o", "own.xnor"), resume):
        code, _, err = run_cli(capsys, *command)
        assert code == 0
        assert err == f"xnor-jax: note: {copied} changed since the run in run began\n"
    file.write_text(file.read_text().replace("rule=rule,", "rule='ste', epochs=2,", 1))
    file.write_text(file.read_text().replace("    epochs=2,\n", "", 1))
    unload(monkeypatch, copied)
    # A resumed run continues with its original recipe.
    code, _, err = run_cli(capsys, *resume)
    assert (code, err) == (
        0,
        f"xnor-jax: note: {copied} changed since the run in run began\n",
    )
    recorded = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recorded["rule"] == f"{copied}:rule"
    file.unlink()
    unload(monkeypatch, copied)
    for command in (("evaluate", "run"), ("pack", "run", "-o", "own.xnor")):
        code, err = run_failing(capsys, *command)
        assert code == 1 and f"there is no module {copied} in the current" in err
    code, err = run_failing(capsys, "train", name)
    assert code == 2 and f"from the folder that contains {copied}.py" in err


def test_run_with_a_lambda_loads_when_given_its_recipe(
    trained, copied, tmp_path, capsys
):
    path = tmp_path / "run" / "recipe.json"
    fields = json.loads(path.read_text()) | {"name": "mine"}
    del fields["checksum"]
    path.write_text(json.dumps(fields))
    code, err = run_failing(capsys, "evaluate", "run")
    assert code == 1 and f"surrogate: {copied}:<lambda>" in err
    assert "pass the recipe to xnor_jax.train.load" in err
    recipe = recipes.get(f"{copied}:RECIPE")
    model = xnor.train.load("run", recipe=recipe)
    x = np.random.default_rng(1).normal(size=(7, 5, 6, 1)).astype(np.float32)
    np.testing.assert_array_equal(model(x), trained[0].model(x))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("{}:Nothing", "{}:Nothing: module {} has no attribute Nothing"),
        ("{}:OTHER", "{}:OTHER: expected an xnor_jax.train.Recipe, got int"),
        ("{}.py:RECIPE", "expected MODULE:NAME, such as {}:RECIPE$"),
        ("./{}.py:RECIPE", "expected MODULE:NAME, such as {}:RECIPE$"),
        ("sub/{}.py:RECIPE", "expected MODULE:NAME, such as sub.{}:RECIPE$"),
        ("/sub/{}.py:RECIPE", "such as {}:RECIPE, from the folder /sub$"),
        ("../{}.py:RECIPE", r"such as {}:RECIPE, from the folder \.\.$"),
        ("nowhere:RECIPE", "there is no module nowhere in the current"),
        ("{}:", "expected MODULE:NAME"),
        ("broken:RECIPE", "cannot import broken: ZeroDivisionError.*broken.py, line 2"),
        ("typo:RECIPE", "cannot import typo: SyntaxError"),
        ("script:RECIPE", "cannot import script: SystemExit: 3 .*script.py, line 1"),
    ],
)
def test_unresolvable_reference_is_one_line(
    reference, message, copied, tmp_path, capsys
):
    (tmp_path / "broken.py").write_text("x = 0\n1 / x\n")
    (tmp_path / "typo.py").write_text("def\n")
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    code, err = run_failing(capsys, "train", reference.format(copied))
    assert code == 2
    assert re.search(message.replace("{}", copied), err), err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_scale": True}, "input_scale: expected False with the model"),
        (
            {"input_scale": True, "multiplier": 2.0},  # the first in order
            "multiplier: expected 1.0 with the model",
        ),
        ({"surrogate": "aprox"}, "surrogate: .*did you mean 'approx'"),
        ({"rule": lambda kernel: kernel}, "rule: expected a function of"),
        ({"surrogate": lambda x: x}, "surrogate: expected a function of"),
        ({"optimizer": lambda: None}, "optimizer: expected a function of"),
        ({"optimizer": optax.adam(0.1)}, "got a transformation; expected a function"),
        ({"weight_method": lambda: None}, "weight_method: expected a function of"),
        ({"weight_method": "recu"}, "weight_method: expected 'latent' with the model"),
        ({"weight_decay": 0.1}, "weight_decay: expected 1e-05 with the optimizer"),
        ({"warmup_epochs": 0.5}, "warmup_epochs: expected 0.0 with the schedule"),
        ({"schedule": lambda steps: steps}, "schedule: .*missing .*'steps'"),
        ({"dataset": lambda folder: folder}, "dataset: expected a function of"),
        ({"model": lambda width: width}, "model: .*missing .*'width'"),
        ({"optimizer": lambda rate: None}, "optimizer: expected .* return an optax.Gr"),
        ({"optimizer": lambda rate: rate / 0}, "optimizer: .* fails: TypeError"),
        ({"schedule": lambda **_: None}, "schedule: expected .* return an optax.Sch"),
        ({"rule": lambda w, g: g.sum()}, "model: .* fails .*rule must return"),
        ({"rule": lambda w, g: g / nothing}, "NameError.*test_custom.py, line"),  # noqa: F821 # pyright: ignore[reportUndefinedVariable]
        ({"model": lambda **_: 3}, "model: expected .* to return an nnx.Module"),
    ],
)
def test_invalid_custom_part_is_one_line(fields, message, recipe, tmp_path):
    recipe = dataclasses.replace(recipe, **fields)
    with pytest.raises(RecipeError, match=message) as error:
        xnor.train.run(recipe, output=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_logits_of_another_shape_are_refused(recipe, tmp_path):
    def seven_classes(*, image_shape, classes, rngs, rule, surrogate):
        options = {"rule": rule, "surrogate": surrogate}
        return recipe.model(image_shape=image_shape, classes=7, rngs=rngs, **options)

    wrong = dataclasses.replace(recipe, model=seven_classes)
    with pytest.raises(RecipeError, match=r"return logits of shape \(2, 3\) for 2"):
        xnor.train.run(wrong, output=tmp_path / "run")


def test_descriptions_round_trip_where_possible(trained, recipe):
    module = trained[1]
    net = recipe.model
    assert custom.find(registry.describe(net)) is net
    wide = functools.partial(net, width=16)
    assert registry.describe(wide) == f"{module}:Net(width=16)"
    assert registry.describe(recipe.surrogate) == f"{module}:<lambda>"
    # An address would differ in the process that resumes the run.
    assert "0x" not in registry.describe(functools.partial(net, width=object()))
    for text in (registry.describe(wide), custom.describe(recipe.surrogate)):
        with pytest.raises(RecipeError, match="expected MODULE:NAME"):
            custom.find(text)
    by_name = dataclasses.replace(recipe, surrogate="approx", optimizer="sgd")
    assert (
        recipes.from_json(json.loads(json.dumps(recipes.to_json(by_name)))) == by_name
    )
    assert recipes.from_json(recipes.to_json(recipe), recipe) == recipe


@pytest.mark.parametrize(("progress", "t"), [(0.0, 0.1), (0.5, 1.0), (1.0, 10.0)])
def test_tanh_temperature_follows_progress(progress, t):
    class Two(nnx.Module):
        def __init__(self, surrogate, inner=None):
            self.surrogate = surrogate
            self.inner = inner

    model = Two("ste", Two("tanh"))
    network.set_temperature(model, np.float32(progress))
    assert model.surrogate == "ste"
    x = np.linspace(-2, 2, 9).astype(np.float32)
    slope = max(1 / t, 1) * t * (1 - np.tanh(t * x.astype(np.float64)) ** 2)
    found = model.inner.surrogate(x, np.ones_like(x))
    # 1 − tanh² cancels: one ulp of error in tanh becomes about max(1, t) · 1e-7.
    np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-5)


def test_error_without_a_message_shows_its_type():
    for part in ("lenet5", Recipe):  # registered, and custom
        with pytest.raises(RecipeError, match="^model: .* fails: ValueError"):
            with custom.errors("model", part):
                raise ValueError


@pytest.mark.parametrize("workers", [-1, 2])
def test_unusable_workers_are_refused(workers, recipe, tmp_path):
    with pytest.raises(RecipeError, match=f"^workers: expected .*, got {workers}"):
        xnor.train.run(recipe, workers=workers, output=tmp_path / "run")


def test_a_recipe_of_another_type_is_refused():
    with pytest.raises(TypeError, match="expected a Recipe, a preset's name"):
        xnor.train.run(3)  # type: ignore[arg-type]


def test_model_without_binary_layers_is_refused(recipe, tmp_path):
    class Dense(nnx.Module):
        def __init__(self, *, image_shape, classes, rngs):
            self.dense = nnx.Linear(math.prod(image_shape), classes, rngs=rngs)

        def __call__(self, x):
            return self.dense(x.reshape(len(x), -1))

    recipe = Recipe(dataset=recipe.dataset, model=Dense, epochs=1, batch_size=16)
    message = "^model: expected BinaryConv or BinaryLinear layers in Dense, .*, got 1"
    with pytest.raises(RecipeError, match=message):
        xnor.train.run(recipe, output=tmp_path / "run")


def test_images_too_small_for_the_model_are_refused(recipe, tmp_path):
    recipe = Recipe(dataset=recipe.dataset, model="lenet5", epochs=1, batch_size=16)
    with pytest.raises(RecipeError, match="^model: lenet5 fails for images of 5×6×1"):
        xnor.train.run(recipe, output=tmp_path / "run")
