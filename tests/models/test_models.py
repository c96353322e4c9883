"""Arguments of the networks; tests/cli/test_recipes.py trains and packs them."""

import jax.numpy as jnp
import pytest
from flax import nnx

import xnor_jax as xnor

LAYERS = xnor.nn.BinaryConv | xnor.nn.BinaryLinear


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
