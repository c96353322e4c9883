"""Activations with learned shifts, compared with their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx
from layer_oracles import assert_close, forward_and_gradients

import xnor_jax as xnor


def test_rsign_is_a_sign_with_a_learned_threshold():
    rng = np.random.default_rng(0)
    x, beta, g = (
        rng.normal(size=(6, 5, 3)),
        rng.normal(size=3),
        rng.normal(size=(6, 5, 3)),
    )
    layer = xnor.nn.RSign(3, surrogate="approx", rngs=nnx.Rngs(0))
    assert not layer.beta[...].any()
    layer.beta[...] = jnp.float32(beta)
    y, d_params, d_x = forward_and_gradients(layer, x, g)
    np.testing.assert_array_equal(y, loop.sign(np.float32(x) - np.float32(beta)))
    expected = g * np.maximum(2 - 2 * np.abs(x - beta), 0)
    assert_close(d_x, expected)
    assert_close(d_params["beta"][...], -expected.sum((0, 1)))
    with pytest.raises(ValueError, match=r"RSign: expected \[..., 3\], got shape"):
        layer(jnp.ones((2, 1)))


def test_rprelu_matches_its_formula():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, 7, 5, 3))
    gamma, zeta, slope = rng.normal(size=(3, 3))
    layer = xnor.nn.RPReLU(3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(jnp.array([-2.0, 0.0, 3.0])), [-0.5, 0, 3])
    for name, value in (("gamma", gamma), ("zeta", zeta), ("slope", slope)):
        getattr(layer, name)[...] = jnp.float32(value)
    y, d_params, d_x = forward_and_gradients(layer, x, g)
    above = x > gamma
    assert_close(y, np.where(above, x - gamma, slope * (x - gamma)) + zeta)
    expected = g * np.where(above, 1, slope)
    assert_close(d_x, expected)
    assert_close(d_params["gamma"][...], -expected.sum((0, 1)))
    assert_close(d_params["zeta"][...], g.sum((0, 1)))
    below = np.where(above, 0, g * (x - gamma))
    assert_close(d_params["slope"][...], below.sum((0, 1)))


@pytest.mark.parametrize("kind", [xnor.nn.RSign, xnor.nn.RPReLU])
def test_activations_respect_dtype_arguments(kind):
    x = jnp.ones((2, 4), jnp.bfloat16)
    assert kind(4, rngs=nnx.Rngs(0))(x).dtype == jnp.float32
    assert kind(4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).dtype == x.dtype
    assert kind(4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).dtype == x.dtype


@pytest.mark.parametrize("features", [-1, 0, 2.5, None])
def test_the_number_of_channels_is_checked(features):
    for kind in (xnor.nn.RSign, xnor.nn.RPReLU):
        with pytest.raises(ValueError, match="expected num_features of 1 or more"):
            kind(features, rngs=nnx.Rngs(0))


def test_bools_are_refused():
    """`False` is 0, whose sign is +1."""
    rngs = nnx.Rngs(0)
    linear = xnor.nn.BinaryLinear(4, 3, rngs=rngs)
    for layer in (linear, xnor.nn.RSign(4, rngs=rngs), xnor.nn.RPReLU(4, rngs=rngs)):
        with pytest.raises(TypeError, match="expected real numbers, got bool"):
            layer(jnp.ones((2, 4), bool))
