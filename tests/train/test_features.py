import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xnor_jax as xnor
from xnor_jax.packing import Info, Preprocessing
from xnor_jax.train import features


@pytest.fixture(scope="module")
def model():
    model = xnor.models.LeNet5(image_shape=(16, 17, 1), classes=3, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.mark.slow
def test_layer_features_are_the_signs_of_its_input(model):
    packed = xnor.pack(model)
    info = Info(preprocessing=Preprocessing((0.4,), (0.3,)))
    packed = dataclasses.replace(packed, info=info)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 17, 1)).astype(np.uint8)
    layer, _ = features.layers(packed, pixels)
    assert layer.name == "block2/layer"
    kernel = np.asarray(model.block2.layer.kernel[...])
    assert (layer.kernel == np.where(kernel < 0, -1, 1)).all()
    x = jnp.asarray((pixels[None] / 255 - 0.4) / 0.3, jnp.float32)
    for step in (model.conv1, model.norm1, nnx.relu, xnor.nn.MaxPool(2, 2)):
        x = step(x)
    signs = np.asarray(xnor.sign(model.block2.norm(x)))[0]
    assert layer.features.shape == signs.shape
    # Rounding may flip the signs of values near 0.
    assert (layer.features == signs).mean() > 0.999
    figure = features.picture(packed, pixels, "title")
    shown = np.asarray(figure.axes[1].get_images()[0].get_array())
    height, width, _ = signs.shape
    assert (shown[:height, width + 1 : 2 * width + 1] == layer.features[..., 1]).all()
