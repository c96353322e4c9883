import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xnor_jax.train.optimizers import make_optimizer, make_schedule
from xnor_jax.train.recipe import Recipe


def recipe(**fields):
    fields = {"epochs": 6, "learning_rate": 0.1, **fields}
    return Recipe(dataset="digits", model="lenet5", **fields)


def steps(rates, **fields):
    """Return the updates of two steps from weight 3 with gradients 2 and −1."""
    given = recipe(weight_decay=0.5, **fields)
    optimizer = optax.chain(*make_optimizer(given, lambda count: rates[count]))
    weight, updates = jnp.float32(3), []
    state = optimizer.init(weight)
    for grad in (2.0, -1.0):
        update, state = optimizer.update(jnp.float32(grad), state, weight)
        updates.append(float(update))
        weight = weight + update
    return updates


RATES = jnp.array([0.1, 0.2])


def test_sgd_has_momentum_and_its_decay_is_coupled_or_not():
    first = 2 + 0.5 * 3
    weight = 3 - 0.1 * first
    second = 0.9 * first + (-1 + 0.5 * weight)
    found = steps(RATES, optimizer="sgd")
    np.testing.assert_allclose(found, [-0.1 * first, -0.2 * second], rtol=1e-5)
    first, weight = 2 + 0.5 * 3, 3 - 0.1 * (2 + 0.5 * 3)
    second = (0.9 * 2 - 1) + 0.5 * weight
    found = steps(RATES, optimizer="sgd", decay="decoupled")
    np.testing.assert_allclose(found, [-0.1 * first, -0.2 * second], rtol=1e-5)


def test_adamw_is_optaxs():
    def by_optax(count):
        return RATES[count]

    optimizer = optax.adamw(by_optax, weight_decay=0.5)
    weight, wanted = jnp.float32(3), []
    state = optimizer.init(weight)
    for grad in (2.0, -1.0):
        update, state = optimizer.update(jnp.float32(grad), state, weight)
        wanted.append(float(update))
        weight = weight + update
    for decay in ("coupled", "decoupled"):
        found = steps(RATES, optimizer="adamw", decay=decay)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    decoupled = steps(RATES, optimizer="adam", decay="decoupled")
    np.testing.assert_array_equal(found, decoupled)
    assert not np.allclose(steps(RATES, optimizer="adam"), wanted)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "steps"])
def test_warm_up_rises_linearly_to_the_rate_and_the_schedule_follows(schedule):
    epochs = (3,) if schedule == "steps" else ()
    warm = recipe(schedule=schedule, warmup_epochs=1.5, decay_epochs=epochs)
    rates = make_schedule(warm, 10)
    found = [float(rates(step)) for step in range(61)]
    np.testing.assert_allclose(found[:16], 0.1 * np.arange(16) / 15, rtol=1e-5)
    if schedule == "steps":
        wanted = [0.1] * 15 + [0.01] * 31
    elif schedule == "linear":
        wanted = 0.1 * (1 - np.arange(46) / 45)
    else:
        wanted = 0.05 * (1 + np.cos(np.pi * np.arange(46) / 45))
    np.testing.assert_allclose(found[15:], wanted, rtol=1e-4, atol=1e-8)


def test_a_schedule_of_ones_own_takes_what_it_names():
    flat = recipe(schedule=lambda learning_rate: optax.constant_schedule(learning_rate))
    assert float(make_schedule(flat, 10)(3)) == pytest.approx(0.1)
    count = recipe(schedule=lambda epochs, steps_per_epoch: lambda _: epochs * 7.0)
    assert make_schedule(count, 10)(3) == 42
