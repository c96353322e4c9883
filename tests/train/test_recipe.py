import dataclasses
import json

import numpy as np
import pytest

from xnor_jax.data import Fit
from xnor_jax.train import recipe as recipes
from xnor_jax.train.recipe import Recipe, RecipeError

BASE = recipes.get("digits-lenet5")


def test_presets_are_valid_and_survive_json():
    for preset in recipes.PRESETS.values():
        assert recipes.validate(preset) is preset
        text = json.dumps(recipes.to_json(preset))
        assert recipes.from_json(json.loads(text)) == preset


def test_reference_recipes_are_the_published_ones():
    mnist = recipes.get("mnist-lenet5-reference")
    assert (mnist.epochs, mnist.batch_size, mnist.learning_rate) == (60, 128, 0.01)
    assert (mnist.schedule, mnist.decay_epochs) == ("steps", (15, 30, 45))
    assert (mnist.weight_decay, mnist.decay, mnist.rule) == (
        1e-5,
        "coupled",
        "corrected",
    )
    assert (mnist.shift, mnist.flip, mnist.calibration_batches) == (0, False, 0)
    nin = recipes.get("cifar10-nin-reference")
    assert (nin.epochs, nin.decay_epochs) == (320, (120, 200, 240, 280))


def test_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", -0.1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("multiplier", float("inf")),
        ("weight_decay", -1e-5),
        ("label_smoothing", 1.0),
        ("teacher", ""),
        ("precision", "1w2a"),
        ("weight_method", "best"),
        ("initial", 3),
        ("decay_factor", 0.0),
        ("calibration_batches", -1),
        ("shift", -1),
        ("rule", "best"),
        ("dataset", np.zeros((20, 20))),
        ("binary", "no"),
        ("flip", 1),
        ("input_scale", None),
        ("resize_crop", "False"),
    ],
)
def test_invalid_field_is_named_with_its_value(field, value):
    with pytest.raises(RecipeError, match=f"^{field}: expected .*, got"):
        recipes.validate(dataclasses.replace(BASE, **{field: value}))


def test_label_smoothing_with_a_teacher_is_refused():
    recipe = dataclasses.replace(BASE, teacher="runs/twin", label_smoothing=0.1)
    with pytest.raises(RecipeError, match="^label_smoothing: expected 0 with a teach"):
        recipes.validate(recipe)


@pytest.mark.parametrize("epochs", [(0,), (3, 3), (5, 2), 3, None, ("3",), (1.5,)])
def test_decay_epochs_must_increase(epochs):
    steps = dataclasses.replace(BASE, schedule="steps", decay_epochs=epochs)
    with pytest.raises(RecipeError, match="^decay_epochs: expected rising"):
        recipes.validate(steps)


def test_decay_epochs_require_the_steps_schedule():
    with pytest.raises(RecipeError, match="cosine"):
        recipes.validate(dataclasses.replace(BASE, decay_epochs=(3,)))


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
def test_decay_factor_requires_decay_epochs(schedule):
    recipe = dataclasses.replace(BASE, schedule=schedule, decay_factor=0.5)
    with pytest.raises(RecipeError, match="decay_factor: expected 0.1, .*, got 0.5"):
        recipes.validate(recipe)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "folder"}, "image_size: expected a whole number ≥ 1, got None"),
        ({"dataset": "folder", "image_size": 0}, "image_size: expected .*, got 0"),
        ({"image_size": 28}, "image_size: expected none for digits"),
        ({"resize_crop": True}, "resize_crop: expected none for digits"),
        (
            {"dataset": "folder", "image_size": 9, "resize_crop": True, "shift": 1},
            "shift: expected 0 with resize_crop, .*, got 1",
        ),
        ({"dataset": "else"}, "dataset: expected one of digits, .*, got 'else'"),
    ],
)
def test_invalid_image_size_options_are_refused(fields, message):
    recipe = dataclasses.replace(BASE, **{"shift": 0, **fields})
    with pytest.raises(RecipeError, match=message):
        recipes.validate(recipe)


def test_evaluation_crops_the_center_as_for_imagenet():
    recipe = dataclasses.replace(BASE, dataset="imagenet", image_size=224)
    assert recipe.fit == Fit(224, 224)
    assert dataclasses.replace(recipe, resize_crop=True).fit == Fit(224, 256)
    assert BASE.fit is None


def test_unknown_recipe_error_lists_the_presets():
    with pytest.raises(
        RecipeError, match="expected one of digits-lenet5, mnist-lenet5"
    ):
        recipes.get("mnist")


def test_damaged_recipe_is_refused():
    fields = recipes.to_json(BASE)
    with pytest.raises(RecipeError):
        recipes.from_json({**fields, "momentum": 1})
    with pytest.raises(RecipeError):
        recipes.from_json({"epochs": 1})
    with pytest.raises(RecipeError):
        recipes.from_json([])  # type: ignore[arg-type]


def test_every_field_has_a_docstring():
    # tyro shows each field's docstring in the command line's help.
    import inspect

    source = inspect.getsource(Recipe)
    for field in dataclasses.fields(Recipe):
        declared = source.index(f"\n    {field.name}:")
        after = source[declared:].split("\n")[2]
        assert after.strip().startswith('"""'), field.name


def test_missing_compute_dtype_is_float32():
    fields = recipes.to_json(BASE)
    del fields["compute_dtype"]
    assert recipes.from_json(fields) == BASE


@pytest.mark.parametrize(
    "fields",
    [
        {"compute_dtype": "float16"},
        {"compute_dtype": "bfloat16", "binary": False},
        {"compute_dtype": "bfloat16", "precision": "1w32a"},
    ],
)
def test_unsupported_compute_dtype_is_refused(fields):
    with pytest.raises(RecipeError, match="^compute_dtype: expected float32"):
        recipes.validate(dataclasses.replace(BASE, **fields))
