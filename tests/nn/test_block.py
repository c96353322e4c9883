from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx
from layer_oracles import (
    assert_close,
    call,
    forward_and_gradients,
    numpy_normal,
    randomize,
    rngs,
)

import xnor_jax as xnor


def xnor_block(*sizes: Any, **options: Any) -> xnor.nn.XnorBlock:
    options = {"kernel_init": numpy_normal, **options}
    return xnor.nn.XnorBlock(*sizes, **options, rngs=rngs())


def block_oracle(block: xnor.nn.XnorBlock, x: np.ndarray, product, statistics=None):
    """BatchNorm → sign → product → bias → ReLU, from the block's own parameters."""
    axes = tuple(range(x.ndim - 1))
    mean, variance = statistics or (x.mean(axes), x.var(axes))
    scale, bias = (np.float64(p[...]) for p in (block.norm.scale, block.norm.bias))
    normal = loop.batch_norm(x, mean, variance, 1e-4, scale, bias)
    # Otherwise the loop and float32 may differ in a sign.
    assert np.abs(normal).min() > 1e-5
    y = product(loop.sign(normal)) + np.float64(block.layer.bias[...])
    return np.maximum(y, 0)


def test_block_order_is_norm_sign_product_relu():
    block = xnor_block(3, 4, (2, 3), padding="VALID")
    randomize(block, 0)
    means, variances = (np.float64(s[...]) for s in (block.norm.mean, block.norm.var))
    x = np.random.default_rng(1).normal(1.0, 2.0, size=(4, 5, 6, 3))
    w = np.float64(block.layer.kernel[...])

    def product(signs):
        return loop.conv(signs, loop.binarize(w), (1, 1), ((0, 0),) * 2, (1, 1))

    block.train()
    assert_close(call(block, jnp.float32(x)), block_oracle(block, x, product))
    axes = (0, 1, 2)
    assert_close(block.norm.mean[...], 0.9 * means + 0.1 * x.mean(axes))
    assert_close(block.norm.var[...], 0.9 * variances + 0.1 * x.var(axes))

    block.eval()
    running = [np.float64(s[...]) for s in (block.norm.mean, block.norm.var)]
    y = call(block, jnp.float32(x))
    assert_close(y, block_oracle(block, x, product, running))
    assert (np.asarray(y) == 0).any(), "nothing was rectified"
    assert_close(block.norm.mean[...], running[0], 0)

    block.relu = False
    unrectified = np.asarray(call(block, jnp.float32(x)))
    assert unrectified.min() < 0
    np.testing.assert_array_equal(np.maximum(unrectified, 0), y)


def test_dense_block_normalizes_channels_then_flattens():
    block = xnor_block(2 * 3 * 5, 4, norm_features=5)
    randomize(block, 2)
    x = np.random.default_rng(3).normal(size=(7, 2, 3, 5))
    w = np.float64(block.layer.kernel[...])
    expected = block_oracle(
        block, x, lambda signs: signs.reshape(7, -1) @ loop.binarize(w)
    )
    assert_close(call(block, jnp.float32(x)), expected)
    assert block.norm.scale.shape == (5,)


def test_block_forwards_its_settings():
    block = xnor_block(
        4,
        6,
        (3, 3),
        epsilon=0.5,
        momentum=0.75,
        relu=False,
        strides=(2, 1),
        padding=1,
        feature_group_count=2,
        dropout=0.25,
        input_scale=True,
        rule="paper",
        binary=False,
        dtype=jnp.bfloat16,
    )
    layer = block.layer
    assert (block.norm.epsilon, block.norm.momentum) == (0.5, 0.75)
    assert (layer.strides, layer.padding, layer.feature_group_count) == ((2, 1), 1, 2)
    assert (layer.dropout.rate, layer.input_scale) == (0.25, True)
    assert (layer.rule, layer.binary, layer.dtype) == ("paper", False, jnp.bfloat16)


BLOCKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "conv": ({"kernel_size": (3, 3)}, (6, 5, 5, 4)),
    "dense, with dropout": ({"dropout": 0.5}, (6, 4)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_second_jitted_step_does_not_recompile(name: str):
    options, shape = BLOCKS[name]
    block = xnor_block(4, 3, **options)
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    traced = []

    @jax.jit
    def step(params, rest, x):
        traced.append(x)

        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return model(x).sum(), nnx.state(model, nnx.Not(nnx.Param))

        grads, rest = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), rest

    rng = np.random.default_rng(0)
    for _ in range(3):
        x = jnp.float32(rng.normal(size=shape))
        params, rest = step(params, rest, x)
    assert len(traced) == step._cache_size() == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_calls_do_not_change_the_latent_kernel(mode: str):
    block = xnor_block(4, 3, (3, 3))
    randomize(block, 0)
    block.layer.kernel[...] *= 3  # Neither centred nor clamped.
    before = jax.tree.map(np.asarray, nnx.state(block, nnx.Param))
    statistics = jax.tree.map(np.asarray, nnx.state(block, nnx.BatchStat))
    getattr(block, mode)()
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 5, 5, 4)))
    first, second = call(block, x), call(block, x)
    forward_and_gradients(block, np.asarray(x), np.ones(first.shape))
    chex.assert_trees_all_equal(nnx.state(block, nnx.Param), before)
    if mode == "eval":
        np.testing.assert_array_equal(first, second)
        chex.assert_trees_all_equal(nnx.state(block, nnx.BatchStat), statistics)
