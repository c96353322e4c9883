import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import random_array, random_kernel

import xnor_jax as xnor

MASK = {"conv": {"kernel": True, "bias": False}, "scale": False}


def make_params():
    kernel = xnor.sign(random_kernel(0, (3, 5, 4)))
    bias, scale = random_array(1, (4,)), random_array(2, (3,))
    return {"conv": {"kernel": kernel, "bias": bias}, "scale": scale}


def make_grads(seed, size=1.0):
    tree = make_params()
    return jax.tree.map(lambda x: size * random_array(seed, x.shape), tree)


def numpy_step(w, g, m, v, gamma, tau, sigma=None, epsilon=1e-10):
    """The papers' formulas, one weight at a time."""
    w, m, v = w.copy(), m.copy(), v.copy()
    for index in np.ndindex(*w.shape):
        m[index] = (1 - gamma) * m[index] + gamma * g[index]
        signal = m[index]
        if sigma is not None:
            v[index] = (1 - sigma) * v[index] + sigma * g[index] ** 2
            signal = m[index] / (np.sqrt(v[index]) + epsilon)
        if abs(signal) >= tau and np.sign(signal) == np.sign(w[index]):
            w[index] = -w[index]
    return w, m, v


@pytest.mark.parametrize("sigma", [None, 0.2], ids=["first order", "second order"])
def test_weights_without_a_gradient_never_flip(sigma):
    optimizer = xnor.optim.bop(0.5, 0.0, sigma=sigma)
    kernel = jnp.array([[1.0, -1.0], [1.0, -1.0]], jnp.bfloat16)
    grad = jnp.array([[0.0, 0.0], [1e-3, -1e-3]], jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = optimizer.update(grad, optimizer.init(kernel), kernel)
    np.testing.assert_array_equal(updates, [[0, 0], [-2, 2]])


@pytest.mark.parametrize("sigma", [None, 0.2], ids=["first order", "second order"])
def test_twenty_steps_agree_with_the_formula(sigma):
    gamma, tau = 0.15, 0.3
    optimizer = xnor.optim.bop(gamma, tau, sigma=sigma, mask=MASK, inner=optax.sgd(0.1))
    params = make_params()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    w = np.asarray(params["conv"]["kernel"], np.float64)
    m, v, bias = (
        np.zeros(w.shape),
        np.zeros(w.shape),
        np.asarray(params["conv"]["bias"]),
    )
    flips = 0
    for step in range(20):
        grads = make_grads(10 + step)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = np.asarray(grads["conv"]["kernel"], np.float64)
        before = w
        w, m, v = numpy_step(w, g, m, v, gamma, tau, sigma)
        bias = bias - 0.1 * np.asarray(grads["conv"]["bias"])
        flips += (before != w).sum()
        np.testing.assert_array_equal(params["conv"]["kernel"], w)
        np.testing.assert_allclose(params["conv"]["bias"], bias, rtol=1e-5, atol=1e-6)
    assert flips > 10


def test_weights_are_signs_after_the_first_step():
    kernel = 3 * random_kernel(0, (5, 3))
    kernel = kernel.at[0, 0].set(0.0).at[1, 1].set(1e-9)
    optimizer = xnor.optim.bop(threshold=10.0)
    updates, _ = optimizer.update(jnp.ones((5, 3)), optimizer.init(kernel), kernel)
    signs = optax.apply_updates(kernel, updates)
    np.testing.assert_allclose(signs, xnor.sign(kernel), rtol=1e-6)
    updates, _ = optimizer.update(jnp.ones((5, 3)), optimizer.init(signs), signs)
    np.testing.assert_array_equal(
        optax.apply_updates(signs, updates), xnor.sign(kernel)
    )


def test_unmasked_leaves_are_constant_without_inner_optimizer():
    optimizer, params = xnor.optim.bop(0.5, mask=MASK), make_params()
    updates, _ = optimizer.update(make_grads(3), optimizer.init(params), params)
    assert not np.any(updates["conv"]["bias"]) and not np.any(updates["scale"])
    assert np.any(updates["conv"]["kernel"])


def test_momentum_at_the_threshold_flips_weights_of_equal_sign():
    kernel = jnp.array([[1.0, 1.0, -1.0, -1.0]]).T @ jnp.ones((1, 1))
    grad = jnp.array([[0.5, -0.5, -0.5, 0.4999]]).T
    optimizer = xnor.optim.bop(gamma=1.0, threshold=0.5)
    updates, _ = optimizer.update(grad, optimizer.init(kernel), kernel)
    new = optax.apply_updates(kernel, updates)
    np.testing.assert_array_equal(new[:, 0], [-1, 1, 1, -1])


def test_scheduled_gamma_does_not_recompile(compilations):
    schedule = optax.linear_schedule(1.0, 0.0, 2)
    optimizer, params = xnor.optim.bop(schedule, 1e-8), jnp.ones((4, 3))
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    _, state = update(jnp.full((4, 3), 2.0), state, params)
    second, before = jnp.full((4, 3), 4.0), compilations()
    _, state = update(second, state, params)
    assert compilations() == before
    np.testing.assert_allclose(optax.tree.get(state, "mu"), 3.0)  # 0.5·2 + 0.5·4


def test_training_without_latent_weights_reaches_a_binary_target():
    x, target = random_array(0, (256, 24)), jnp.sign(random_kernel(1, (24, 6)))
    y = x @ target
    params = jnp.sign(random_kernel(2, (24, 6)))
    optimizer = xnor.optim.bop(gamma=0.3, threshold=0.3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean((x @ xnor.binarize(params, rule="ste") - y) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(60):
        params, state = step(params, state)
    assert jnp.mean(params == target) > 0.97


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, r"gamma to be a number in \(0, 1\], got 0.0"),
        ({"gamma": 1.5}, "gamma"),
        ({"threshold": -1e-8}, "threshold to be a number of at least 0"),
        ({"sigma": 0.0}, "sigma"),
        ({"epsilon": 0.0}, "epsilon to be a number above 0"),
        ({"gamma": float("nan")}, "gamma"),
        ({"gamma": "x"}, "gamma .* got 'x'"),
        ({"epsilon": None}, "epsilon"),
        ({"threshold": jnp.ones(2)}, "threshold"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=f"bop: expected {message}"):
        xnor.optim.bop(**options)


def test_missing_params_and_non_kernels_are_refused():
    optimizer = xnor.optim.bop()
    state = optimizer.init({"a": jnp.ones((2, 3))})
    for inner in (3, optax.adam):
        with pytest.raises(TypeError, match="inner to be an optax transformation"):
            xnor.optim.bop(mask=True, inner=inner)
        with pytest.raises(TypeError, match="inner to be an optax transformation"):
            xnor.optim.binop(inner)
    with pytest.raises(ValueError, match="bop: update needs the latent params"):
        optimizer.update({"a": jnp.ones((2, 3))}, state)
    with pytest.raises(ValueError, match=r"bop: .*shape \(2, 3\), got \(3,\).*\['a'\]"):
        optimizer.update({"a": jnp.ones(3)}, state, {"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"bop: .* at \['b'\]"):
        optimizer.init({"b": jnp.ones(3)})
