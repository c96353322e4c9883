"""Surrogate gradients against their formulas, and the sign function that uses them."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from absl.testing import parameterized
from jax import lax
from oracles import random_array

import xnor_jax as xnor
from xnor_jax import quantizers

jit_and_eager: Any = chex.variants(with_jit=True, without_jit=True)


def approx(x):
    return np.where(np.abs(x) < 1, 2 - 2 * np.abs(x), 0)


def swish(x, beta=5.0):
    y = beta * x
    return beta * (2 - y * np.tanh(y / 2)) / (1 + np.cosh(y))


def tanh(x, t=1.0):
    return max(1 / t, 1) * t * (1 - np.tanh(t * x) ** 2)


SLOPES = {
    "ste": lambda x: np.where(np.abs(x) < 1, 1.0, 0.0),
    "identity": np.ones_like,
    "approx": approx,
    "swish": swish,
    "tanh": tanh,
}


def slope(surrogate, x):
    return jax.grad(lambda x: quantizers.sign(x, surrogate).sum())(x)


def every_surrogate(x, g):
    found = {}
    for name in SLOPES:
        y, pull = jax.vjp(partial(quantizers.sign, surrogate=name), x)
        found[name] = y, pull(g)[0]
    return found


class OracleTest(chex.TestCase):
    variant: Any

    @jit_and_eager
    @parameterized.product(dtype=oracles.DTYPES)
    def test_gradients_match_float64_slopes(self, dtype):
        edges = [0.0, -0.0, 1.0, -1.0, 1.5, -0.25, 3.0]
        x = jnp.concatenate([jnp.asarray(edges, dtype), random_array(0, (21,), dtype)])
        g = random_array(1, x.shape, dtype)
        for name, (y, gradient) in self.variant(every_surrogate)(x, g).items():
            assert gradient.dtype == y.dtype == x.dtype
            np.testing.assert_array_equal(y, oracles.sign(x))
            expected = oracles.f64(g) * SLOPES[name](oracles.f64(x))
            # Computed in float32, rounded once.
            tolerance = max(1e-5, float(jnp.finfo(dtype).eps))
            np.testing.assert_allclose(
                oracles.f64(gradient), expected, rtol=tolerance, atol=1e-6
            )


@pytest.mark.parametrize(
    ("name", "published"),
    # larq's, at the same points.
    [
        ("approx", [0, 0, 1.4, 2, 1.4, 0, 0]),
        ("swish", [-0.03, -0.195, 1.562, 5, 1.562, -0.195, -0.03]),
    ],
)
def test_slopes_match_published_values(name: str, published: list[float]):
    x = jnp.array([-1.5, -1, -0.3, 0, 0.3, 1, 1.5])
    np.testing.assert_allclose(slope(name, x), published, atol=5e-4)


def test_ste_excludes_one_in_every_dtype():
    for dtype in oracles.DTYPES:
        eps = float(jnp.finfo(dtype).eps)
        inside = [0.0, -0.0, 0.3, -0.9, 1 - eps, eps - 1]
        beyond = [1.0, -1.0, 1 + eps, -1 - eps, 5.0, -5.0, np.inf, -np.inf]
        gradient = slope("ste", jnp.asarray(inside + beyond, dtype))
        np.testing.assert_array_equal(gradient, [1] * len(inside) + [0] * len(beyond))


@pytest.mark.parametrize("name", ["ste", "approx", "swish", "tanh"])
def test_large_inputs_have_zero_gradient(name: str):
    x = jnp.array([30.0, -100.0, 1e30, -3e38, jnp.inf])
    np.testing.assert_allclose(slope(name, x), np.zeros(5), atol=1e-20)


@pytest.mark.parametrize("value", [0.1, 1.0, 3.0, 10.0])
def test_surrogate_parameters_match_formulas(value: float):
    x = np.linspace(-2, 2, 41)
    for ours, expected in (
        (partial(quantizers.tanh, temperature=value), tanh(x, value)),
        (partial(quantizers.swish, beta=value), swish(x, value)),
    ):
        np.testing.assert_allclose(
            slope(ours, jnp.float32(x)), expected, rtol=1e-4, atol=1e-5
        )


def schedule(step):
    """The temperature of error decay at an integer step of 20."""
    return 10 ** (-1 + 2 * step / 20)


def test_a_temperature_may_be_traced():
    x = jnp.float32(np.linspace(-2, 2, 11))

    def gradient(step):
        # One closure captures a traced float, the other a traced integer.
        by_value = partial(quantizers.tanh, temperature=schedule(step))
        by_step = lambda x, g: quantizers.tanh(x, g, schedule(step))  # noqa: E731
        return slope(by_value, x), slope(by_step, x)

    expected = [tanh(np.float64(x), schedule(step)) for step in range(3)]
    _, scanned = jax.jit(
        lambda: lax.scan(lambda c, step: (c, gradient(step)), 0, jnp.arange(3))
    )()
    mapped = jax.vmap(gradient)(jnp.arange(3))
    single = [jax.jit(gradient)(step) for step in range(3)]
    for found in (*scanned, *mapped, *map(jnp.stack, zip(*single, strict=True))):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_traced_temperature_works_in_nested_jit():
    x = jnp.float32(np.linspace(-2, 2, 11))

    @jax.jit
    def inner(x, step):
        surrogate = lambda x, g: quantizers.tanh(x, g, schedule(step))  # noqa: E731
        return quantizers.sign(x, surrogate).sum()

    found = jax.jit(jax.grad(lambda x: inner(x, 7)))(x)
    np.testing.assert_allclose(found, tanh(np.float64(x), schedule(7)), rtol=1e-4)
    # The temperature's gradient is 0.
    temperature_gradient = jax.grad(
        lambda t: quantizers.sign(x, partial(quantizers.tanh, temperature=t)).sum()
    )
    assert temperature_gradient(2.0) == 0


def test_custom_surrogates_run_in_float32():
    seen = []

    def surrogate(x, grad):
        seen.append((x.dtype, grad.dtype))
        return grad * 1e5 * x

    x = jnp.asarray([0.25, -2.0], jnp.float16)
    gradient = jax.grad(
        lambda x: (1e-4 * quantizers.sign(x, surrogate)).astype(jnp.float32).sum()
    )(x)
    assert set(seen) == {(jnp.dtype("float32"),) * 2}
    np.testing.assert_allclose(gradient, [2.5, -20], rtol=1e-2)


def test_vmap_matches_a_loop():
    x = random_array(0, (4, 5), jnp.float32)
    for name in SLOPES:
        mapped = jax.vmap(partial(slope, name))(x)
        np.testing.assert_allclose(mapped, [slope(name, row) for row in x], rtol=1e-6)


@pytest.mark.parametrize(
    ("surrogate", "error", "message"),
    [
        ("best", ValueError, "surrogate: unknown name 'best'; expected one of ste, "),
        (3, TypeError, "surrogate: expected a name or an .*got 3"),
        (None, TypeError, "surrogate: expected a name or an .*got None"),
        (lambda x, g: g.sum(), ValueError, r"shape \(2, 3\), got \(\)"),
        (lambda x, g: (g, x), ValueError, r"shape \(2, 3\), got \("),
        (partial(quantizers.tanh, temperature=0.0), ValueError, "temperature: .*got 0"),
        (partial(quantizers.swish, beta=-1), ValueError, "beta: .*above 0, got -1"),
    ],
)
def test_invalid_surrogates_are_refused_in_the_forward_pass(surrogate, error, message):
    with pytest.raises(error, match=message):
        quantizers.sign(jnp.ones((2, 3)), surrogate)


def test_mismatched_shapes_and_integers_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        quantizers.approx(jnp.ones(2), jnp.ones(3))
    with pytest.raises(TypeError, match="floating point x, got int32"):
        quantizers.ste(jnp.ones(2, jnp.int32), jnp.ones(2))


def test_second_sign_blocks_the_gradient_only_with_ste():
    x = jnp.array([0.5, -0.25])
    signs = xnor.sign_ste(x)
    assert not slope("ste", signs).any()
    assert slope("identity", signs).all()
