"""The library's training step against the reference's in PyTorch.

Both run in float64, where rounding flips no sign: any difference is in the arithmetic.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import in_float64

from xnor_jax import masks, weights
from xnor_jax.data import SOURCES
from xnor_jax.train import recipe, step

torch: Any = pytest.importorskip(
    "torch", reason="PyTorch is the optional extra `experiments`"
)

BENCHMARKS = Path(__file__).parent.parent / "experiments" / "benchmarks"
BATCH, STEPS = 16, 4
# Each parameter's name in the library and in PyTorch.
NAMES = {
    "conv1/kernel": "conv1.weight",
    "conv1/bias": "conv1.bias",
    "block2/norm/scale": "block2.norm.weight",
    "block2/norm/bias": "block2.norm.bias",
    "block2/layer/kernel": "block2.product.weight",
    "block2/layer/bias": "block2.product.bias",
    "block3/norm/scale": "block3.norm.weight",
    "block3/norm/bias": "block3.norm.bias",
    "block3/layer/kernel": "block3.product.weight",
    "block3/layer/bias": "block3.product.bias",
    "dense4/kernel": "dense4.weight",
    "dense4/bias": "dense4.bias",
}
NORMS = {"norm1": "norm1", "block2/norm": "block2.norm", "block3/norm": "block3.norm"}


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("torch_reference")
    sys.path.remove(str(BENCHMARKS))


def by_path(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {masks.path_string(path): np.asarray(leaf) for path, leaf in leaves}


def to_torch(name, array):
    """A parameter of the library in PyTorch's layout."""
    if name == "block3/layer/kernel":  # its features are (H, W, C), PyTorch's (C, H, W)
        return array.reshape(4, 4, 50, 500).transpose(3, 2, 0, 1).reshape(500, 800)
    return np.moveaxis(array, (-1, -2), (0, 1)) if array.ndim > 1 else array


def draw(params):
    """Draw parameters that centring, clamping and the minimum scale all change."""
    rng = np.random.default_rng(0)

    def draw_leaf(path, leaf):
        name = masks.path_string(path)
        values = rng.normal(size=leaf.shape)
        if name.endswith("norm/scale"):
            return jnp.asarray(np.where(values > 0.5, 0.011, 0.5 + np.abs(values)))
        width = 0.6 if name in ("block2/layer/kernel", "block3/layer/kernel") else 0.2
        return jnp.asarray(width * values)

    return jax.tree.map_with_path(draw_leaf, params)


def shared_max_pool(x):
    """2×2 max-pooling; tied sums of ±α share the gradient, as in the library.

    In the library tied sums are equal: α times equal integers. PyTorch sums ±α itself,
    so that rounding would decide which of them gets the gradient.
    """

    def largest(a, b):
        weight = torch.where((a - b).abs() < 1e-9, 0.5, (a > b).to(a.dtype))
        return weight * a + (1 - weight) * b

    x = largest(x[:, :, ::2], x[:, :, 1::2])
    return largest(x[..., ::2], x[..., 1::2])


@pytest.mark.slow
def test_training_matches_the_pytorch_reference(reference):
    rng = np.random.default_rng(1)
    batches = [
        (rng.normal(size=(BATCH, 28, 28, 1)), rng.integers(0, 10, BATCH))
        for _ in range(STEPS)
    ]

    with jax.enable_x64(True):
        trainer, state = step.create(
            recipe.get("mnist-lenet5-reference"),
            SOURCES["mnist"],
            image_shape=(28, 28, 1),
            classes=10,
            steps_per_epoch=468,
        )
        initial_params = draw(state.params)
        params = weights.project(initial_params, trainer.inner)
        state = in_float64(
            state._replace(params=params, opt_state=trainer.optimizer.init(params))
        )
        train_step = jax.jit(lambda *args: step.train_step(trainer, *args))
        losses, flips = [], []
        for x, labels in batches:
            state, metrics, flip_ratios = train_step(
                state, jnp.asarray(x), jnp.asarray(labels)
            )
            losses.append(float(metrics.loss))
            flips.append([float(share) for share in jax.tree.leaves(flip_ratios)])
        ours = by_path(state.params)
        statistics = by_path(nnx.filter_state(state.rest, nnx.BatchStat))

    net = reference.LeNet5(pool=shared_max_pool).double()
    named = dict(net.named_parameters())
    with torch.no_grad():
        for name, array in by_path(initial_params).items():
            named[NAMES[name]].copy_(torch.tensor(to_torch(name, array)))
    training = reference.Training(net)
    expected = []
    for x, labels in batches:
        images = torch.tensor(x.transpose(0, 3, 1, 2))
        expected.append(float(training.step(images, torch.tensor(labels))[0]))
    training.prepare()  # the library projects after each step

    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert set(ours) == set(NAMES)
    for name, array in ours.items():
        theirs = named[NAMES[name]].detach().numpy()
        np.testing.assert_allclose(
            to_torch(name, array), theirs, rtol=0, atol=1e-8, err_msg=name
        )
    # The batches must exercise every part of the step.
    assert np.min(flips) > 0.001
    assert abs(ours["block2/layer/kernel"]).max() == 1
    assert np.isclose(ours["block2/norm/scale"].min(), 0.01)

    counts = {"norm1": 24 * 24, "block2/norm": 12 * 12, "block3/norm": 4 * 4}
    buffers = dict(net.named_buffers())
    first = 0.9**STEPS  # the weight left of the initial variance, 1
    for name, torch_name in NORMS.items():
        count = BATCH * counts[name]
        mean, variance = statistics[f"{name}/mean"], statistics[f"{name}/var"]
        unbiased = (variance - first) * count / (count - 1) + first
        for array, statistic in ((mean, "running_mean"), (unbiased, "running_var")):
            theirs = buffers[f"{torch_name}.{statistic}"].numpy()
            np.testing.assert_allclose(array, theirs, rtol=1e-8, atol=1e-8)
