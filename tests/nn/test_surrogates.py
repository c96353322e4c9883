"""Layers with surrogate gradients; `surrogate=None` requires inputs of ±1."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx
from jax import lax
from jax.experimental import checkify
from layer_oracles import (
    Case,
    assert_close,
    conv,
    forward_and_gradients,
    linear,
    rngs,
)

import xnor_jax as xnor
from xnor_jax import quantizers
from xnor_jax.ops import available_backends


def triangle(x: Any, grad: Any):
    """A user-defined surrogate."""
    return grad * jnp.maximum(1 - jnp.abs(x) / 2, 0)


SLOPES: dict[Any, Any] = {
    "ste": lambda x: np.where(np.abs(x) < 1, 1.0, 0.0),
    "identity": np.ones_like,
    "approx": lambda x: np.maximum(2 - 2 * np.abs(x), 0),
    "swish": lambda x: (
        5 * (2 - 5 * x * np.tanh(2.5 * x)) / (1 + np.cosh(5 * np.clip(x, -9, 9)))
    ),
    "tanh": lambda x: 1 - np.tanh(x) ** 2,
    triangle: lambda x: np.maximum(1 - np.abs(x) / 2, 0),
}
BACKENDS = [name for name in available_backends() if name in ("cpu", "float")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_surrogates_change_only_the_gradient(backend: str):
    first = None
    for surrogate, slope in SLOPES.items():
        case = Case("rank 2", surrogate=surrogate, backend=backend)
        y, d_params, d_x = forward_and_gradients(case.layer, case.x, case.g)
        first = y if first is None else first
        np.testing.assert_array_equal(y, first)
        d_signs, d_binarized = case.gradients(case.g)
        assert_close(d_x, d_signs * slope(case.x))
        assert_close(d_params["kernel"][...], loop.corrected(case.kernel, d_binarized))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_signs_have_zero_gradient(backend: str):
    for surrogate in ("approx", None):
        layer = linear(64, 64, dropout=0.5, surrogate=surrogate, backend=backend)
        x = np.where(np.random.default_rng(0).normal(size=(9, 64)) < 0, -1.0, 1.0)
        x = x / 2 if surrogate else x
        _, _, d_x = forward_and_gradients(layer, x, np.ones((9, 64)))
        assert 0.3 < (np.asarray(d_x) == 0).mean() < 0.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_preceding_sign_requires_surrogate_none(backend: str):
    case = Case("same", surrogate=None, backend=backend)
    with_ste = Case("same", backend=backend)

    def loss(layer, x):
        return jnp.vdot(layer(quantizers.sign(x, "approx")), jnp.float32(case.g))

    d_signs, _ = case.gradients(case.g)
    x = jnp.float32(case.x)
    found = jax.jit(jax.grad(partial(loss, case.layer)))(x)
    assert_close(found, d_signs * np.maximum(2 - 2 * np.abs(case.x), 0))
    # The trap: the gradient of the layer's own sign is 0 at ±1.
    assert not jax.jit(jax.grad(partial(loss, with_ste.layer)))(x).any()


LAYERS = {
    "BinaryConv": lambda **options: (conv(4, 6, **options), (2, 5, 5, 4)),
    "BinaryLinear": lambda **options: (linear(4, 6, **options), (3, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_activations_other_than_signs_are_reported(name: str):
    layer, shape = LAYERS[name](surrogate=None)
    signs = np.where(np.random.default_rng(0).normal(size=shape) < 0, -1, 1)
    good = jnp.float32(signs)
    message = f"{name}: surrogate=None expects activations of −1 and"
    checked = jax.jit(checkify.checkify(lambda x: layer(x).sum()))
    for bad in (0.0, 0.5, -1.0001, np.nan, np.inf):
        wrong = good.at[(0,) * len(shape)].set(bad)
        with pytest.raises(ValueError, match=message):
            layer(wrong)
        assert message in checked(wrong)[0].get()
    with pytest.raises(ValueError, match=message):
        jax.grad(lambda x: layer(x).sum())(wrong)
    assert layer(good).shape
    assert checked(good)[0].get() is None
    # The float twin accepts any input.
    LAYERS[name](surrogate=None, binary=False)[0](wrong)


@pytest.mark.slow
def test_sign_check_works_under_transformations():
    layer = linear(4, 4, surrogate=None)
    x = jnp.float32(np.where(np.arange(12).reshape(3, 4) % 3, 1, -1))
    expected = layer(x)

    def scanned(x):
        return lax.scan(lambda c, row: (c, layer(row)), 0, x)[1]

    for run in (
        jax.jit(layer),
        jax.vmap(layer),
        jax.jit(scanned),
        jax.jit(jax.checkpoint(layer)),
        lambda x: jax.lax.cond(True, layer, lambda x: -layer(x), x),
    ):
        assert_close(run(x), expected, 1e-6)
    gradient = jax.grad(lambda x: jax.checkpoint(layer)(x).sum())
    assert_close(jax.jit(gradient)(x), jax.grad(lambda x: layer(x).sum())(x))


def test_layers_accept_a_step_dependent_temperature():
    layer = linear(5, 3)
    x = np.random.default_rng(0).normal(size=(4, 5))
    graph, state = nnx.split(layer)

    @jax.jit
    def gradient(x, step):
        model = nnx.merge(graph, state)
        t = 10 ** (-1 + 2 * step / 10)
        model.surrogate = partial(quantizers.tanh, temperature=t)
        return jax.grad(lambda x: model(x).sum())(x)

    for step in (0, 7):
        t = 10 ** (-1 + 2 * step / 10)
        slope = max(1 / t, 1) * t * (1 - np.tanh(t * x) ** 2)
        d_signs = loop.binarize(np.float64(layer.kernel[...])).sum(-1)
        assert_close(gradient(jnp.float32(x), step), d_signs * slope, 1e-4)


@pytest.mark.slow
def test_stacked_layers_run_only_under_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs: nnx.Rngs):
        return xnor.nn.BinaryConv(4, 4, (3, 3), surrogate="approx", rngs=rngs)

    layers = stack(nnx.Rngs(0))
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 5, 5, 4)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    expected = x
    for index in range(3):
        layer = conv(4, 4)
        layer.kernel[...] = layers.kernel[...][index]
        layer.bias[...] = layers.bias[...][index]
        expected = layer(expected)
    assert_close(run(layers, x), expected, 1e-5)
    gradients = nnx.grad(lambda layers: run(layers, x).sum())(layers)
    assert gradients["kernel"].shape == (3, 3, 3, 4, 4)
    assert all(np.abs(g).max() > 0 for g in gradients["kernel"][...])
    with pytest.raises(
        ValueError, match=r"BinaryConv: .*got shape \(3, 3, 3, 4, 4\).*nnx.scan"
    ):
        layers(x)


def test_block_forwards_its_surrogate():
    block = xnor.nn.XnorBlock(4, 5, (3, 3), surrogate=triangle, rngs=rngs())
    assert block.layer.surrogate is triangle
    with pytest.raises(ValueError, match="XnorBlock: surrogate=None"):
        xnor.nn.XnorBlock(4, 5, surrogate=None, rngs=rngs())
