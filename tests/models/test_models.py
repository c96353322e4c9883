"""Each network trains with its recipe and packs; packing compares the outputs.

Tests in tests/cli do so with the commands for LeNet-5, NIN and ResNet-18.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xnor_jax as xnor
from xnor_jax import data, masks
from xnor_jax.train import loop, recipe, step

# A recipe for each network, and a small image shape that is not square.
RECIPES = {
    "alexnet": ("imagenet-alexnet", (67, 68, 3)),
    "vggsmall": ("cifar10-vggsmall", (9, 8, 3)),
    "resnet20": ("cifar10-resnet20", (9, 6, 3)),
    "birealnet18": ("imagenet-birealnet18", (9, 8, 3)),
    "reactneta": ("imagenet-reactneta", (9, 8, 3)),
}
LAYERS = xnor.nn.BinaryConv | xnor.nn.BinaryLinear
QUICK = {"xla_backend_optimization_level": 0}


def test_every_imagenet_recipe_is_covered():
    imagenet = {name for name in recipe.PRESETS if name.startswith("imagenet")}
    assert imagenet - {"imagenet-resnet18"} <= {name for name, _ in RECIPES.values()}


@pytest.mark.parametrize("name", xnor.models.MODELS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", 0),
        ("classes", -3),
        ("classes", 2.5),
        ("image_shape", None),
        ("image_shape", (70.0, 70, 3)),
        ("image_shape", (70, 70)),
        ("image_shape", (70, 70, 3, 1)),
        ("image_shape", (0, 70, 3)),
        ("image_shape", (70, 70, 0)),
    ],
)
def test_invalid_shapes_and_classes_are_refused(name: str, field: str, value):
    arguments: dict = {"image_shape": (70, 70, 3), "classes": 10, field: value}
    with pytest.raises(ValueError, match=rf"^\w+: .*{field}.*, got"):
        xnor.models.MODELS[name](**arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "lenet5" else [pytest.mark.slow])
        for name in xnor.models.MODELS
    ],
)
def test_settings_reach_every_binary_layer(name: str):
    settings = {"rule": "ste", "input_scale": True, "compute_dtype": jnp.bfloat16}

    def build():
        shape, rngs = (67, 67, 3), nnx.Rngs(0)
        options = {"classes": 3, "surrogate": "swish", **settings}
        return xnor.models.MODELS[name](image_shape=shape, rngs=rngs, **options)

    modules = [module for _, module in nnx.iter_modules(nnx.eval_shape(build))]
    layers = [module for module in modules if isinstance(module, LAYERS)]
    assert len(layers) >= 2
    for layer in layers:
        assert {key: getattr(layer, key) for key in settings} == settings
    # A layer without a surrogate follows an RSign, which has one.
    surrogates = {getattr(module, "surrogate", None) for module in modules}
    assert surrogates - {None} == {"swish"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_model_trains_one_step_and_packs(name: str):
    preset, shape = RECIPES[name]
    # The first step of a warm-up has a learning rate of 0.
    fields = {"batch_size": 4, "warmup_epochs": 0.0}
    settings = dataclasses.replace(recipe.get(preset), **fields)
    assert settings.model == name
    source = data.SOURCES[settings.dataset]
    trainer, state = step.create(
        settings, source, image_shape=shape, classes=5, steps_per_epoch=2
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32)
    labels = jnp.asarray([0, 4, 2, 1])

    def take_a_step(state):
        return step.train_step(trainer, state, x, labels)[:2]

    new, metrics = jax.jit(take_a_step, compiler_options=QUICK)(state)
    assert np.isfinite(metrics.loss)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, new.params)
    for path, any_changed in jax.tree.leaves_with_path(changed):
        name = masks.path_string(path)
        assert any_changed or not name.endswith("kernel"), name
    model = loop.trained_model(trainer, new)
    layers = [m for _, m in nnx.iter_modules(model) if isinstance(m, LAYERS)]
    packed = xnor.pack(model)
    assert sum(row.kind == "binary" for row in packed.report.rows) == len(layers) > 1
