"""A packed network on every image of Fashion-MNIST's test set."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xnor_jax as xnor
from xnor_jax import data
from xnor_jax.data import preprocess
from xnor_jax.train import recipe as recipes
from xnor_jax.train import step

FASHION = Path(__file__).parents[3] / "shared" / "data" / "fashion_mnist"
STEPS = 50


@pytest.mark.slow
def test_packed_classes_match_float_on_the_test_set():
    if not FASHION.is_dir():
        pytest.skip("needs ../shared/data/fashion_mnist")
    recipe = recipes.get("fashion-lenet5")
    dataset = data.load(recipe.dataset, FASHION)
    trainer, state = step.create(
        recipe,
        dataset.source,
        image_shape=dataset.train.images.shape[1:],
        classes=len(dataset.class_names),
        steps_per_epoch=STEPS,
    )
    count = STEPS * recipe.batch_size
    images, labels = dataset.train.images[:count], dataset.train.labels[:count]
    train_epoch = step.make_train_epoch(trainer)
    state, metrics, _ = train_epoch(state, images, labels, jax.random.key(0))
    assert metrics.accuracy > 0.5

    def float_logits(x):
        model = nnx.merge(trainer.graphdef, state.params, state.rest, copy=True)
        model.eval()
        return model(x)

    model = nnx.merge(trainer.graphdef, state.params, state.rest)
    model.eval()
    packed = xnor.pack(model)
    # The others are slow, as they unpack the bits to numbers, or are "xla" on a CPU.
    backends = sorted({"xla", "cpu"} & {*xnor.ops.available_backends()})
    networks = {b: jax.jit(packed.with_backend(b).__call__) for b in backends}
    prepare = xnor.packing.Preprocessing(dataset.source.mean, dataset.source.std)
    differences = dict.fromkeys(backends, 0)
    assert len(dataset.test.images) == 10_000
    for first in range(0, 10_000, 2_000):
        pixels = jnp.asarray(dataset.test.images[first : first + 2_000])
        x = prepare(pixels)
        np.testing.assert_array_equal(x, preprocess.normalize(dataset.source, pixels))
        # Op by op: each rounds its result, as in the packed network.
        wanted = np.asarray(float_logits(x))
        for backend, network in networks.items():
            logits = np.asarray(network(x))
            error = np.abs(logits - wanted).max(-1) / np.abs(wanted).max(-1)
            differs = error > 1e-4
            differences[backend] += int(differs.sum())
            same = logits.argmax(-1) == wanted.argmax(-1)
            assert (same | differs).all()
    # On a CPU both networks compute identical sums in the real first layer.
    assert differences.get("cpu", 0) == 0
    # Another program may add in another order: a sum near a threshold may then cross
    # it, which changes the class if it was a close call.
    assert max(differences.values()) <= 3
