import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xnor_jax.train.optimizers import make_optimizer, make_schedule
from xnor_jax.train.recipe import Recipe


def recipe(**fields):
    fields = {"epochs": 6, "learning_rate": 0.1, **fields}
    return Recipe(dataset="digits", model="lenet5", **fields)


def two_updates(rates, **fields):
    """Return the updates of two steps from weight 3 with gradients 2 and −1."""
    settings = recipe(weight_decay=0.5, **fields)
    optimizer = optax.chain(*make_optimizer(settings, lambda count: rates[count]))
    weight, updates = jnp.float32(3), []
    state = optimizer.init(weight)
    for grad in (2.0, -1.0):
        update, state = optimizer.update(jnp.float32(grad), state, weight)
        updates.append(float(update))
        weight = weight + update
    return updates


RATES = jnp.array([0.1, 0.2])


def test_sgd_has_momentum_and_either_weight_decay():
    first = 2 + 0.5 * 3
    weight = 3 - 0.1 * first
    second = 0.9 * first + (-1 + 0.5 * weight)
    found = two_updates(RATES, optimizer="sgd")
    np.testing.assert_allclose(found, [-0.1 * first, -0.2 * second], rtol=1e-5)
    first, weight = 2 + 0.5 * 3, 3 - 0.1 * (2 + 0.5 * 3)
    second = (0.9 * 2 - 1) + 0.5 * weight
    found = two_updates(RATES, optimizer="sgd", decay="decoupled")
    np.testing.assert_allclose(found, [-0.1 * first, -0.2 * second], rtol=1e-5)


def test_adamw_matches_optax():
    def schedule(count):
        return RATES[count]

    optimizer = optax.adamw(schedule, weight_decay=0.5)
    weight, wanted = jnp.float32(3), []
    state = optimizer.init(weight)
    for grad in (2.0, -1.0):
        update, state = optimizer.update(jnp.float32(grad), state, weight)
        wanted.append(float(update))
        weight = weight + update
    for decay in ("coupled", "decoupled"):
        found = two_updates(RATES, optimizer="adamw", decay=decay)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    decoupled = two_updates(RATES, optimizer="adam", decay="decoupled")
    np.testing.assert_array_equal(found, decoupled)
    # Adam's first step has the size of the learning rate, whatever the gradient is:
    # only decay that is added after it changes this size.
    coupled = two_updates(RATES, optimizer="adam")
    np.testing.assert_allclose([coupled[0], wanted[0]], [-0.1, -0.25], rtol=1e-5)


@pytest.mark.parametrize("warmup", [0, 15])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "steps"])
def test_schedule_follows_a_linear_warmup(schedule, warmup):
    epochs = (3, 5) if schedule == "steps" else ()
    warm = recipe(schedule=schedule, warmup_epochs=warmup / 10, decay_epochs=epochs)
    rates = make_schedule(warm, 10)
    found = [float(rates(step)) for step in range(61)]
    np.testing.assert_allclose(found[:warmup], 0.1 * np.arange(warmup) / 15, rtol=1e-5)
    progress = np.linspace(0, 1, 61 - warmup)
    wanted = {
        "cosine": 0.05 * (1 + np.cos(np.pi * progress)),
        "linear": 0.1 * (1 - progress),
        "steps": [0.1] * (30 - warmup) + [0.01] * 20 + [0.001] * 11,
    }
    np.testing.assert_allclose(found[warmup:], wanted[schedule], rtol=1e-4, atol=1e-8)


def test_custom_schedule_gets_the_arguments_it_names():
    flat = recipe(schedule=lambda learning_rate: optax.constant_schedule(learning_rate))
    assert float(make_schedule(flat, 10)(3)) == pytest.approx(0.1)
    count = recipe(schedule=lambda epochs, steps_per_epoch: lambda _: epochs * 7.0)
    assert make_schedule(count, 10)(3) == 42
