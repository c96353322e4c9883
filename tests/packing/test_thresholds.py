"""Thresholds against the functions that they replace, on integer and float sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xnor_jax.ops import Threshold, unpack_bits
from xnor_jax.packing import thresholds
from xnor_jax.weights import sign

EXTREMES = [0, -0.0, 1e-30, -1e-30, 1e-42, -1e-42, 1e35, -1e35, 1, -1, 3.5, -0.1]


class AffineBatchNorm(nnx.Module):
    """α, a bias, optional ReLU and BatchNorm, with extreme constants."""

    def __init__(self, channels, *, relu, seed):
        rng = np.random.default_rng(seed)
        self.relu = relu
        self.norm = nnx.BatchNorm(channels, epsilon=1e-4, rngs=nnx.Rngs(0))
        indices = rng.integers(0, len(EXTREMES), channels)
        gamma = np.where(rng.random(channels) < 0.5, np.take(EXTREMES, indices), 1)
        gamma = gamma * rng.normal(size=channels)
        # As α is a power of 2, some values equal the mean exactly: BatchNorm gives 0.
        alpha = np.where(
            rng.random(channels) < 0.2, 0, 2.0 ** rng.integers(-9, 3, channels)
        )
        mean = alpha * rng.integers(-40, 41, channels)
        mean = np.where(rng.random(channels) < 0.3, rng.normal(size=channels) * 9, mean)
        beta = rng.choice([0, 0, 0, 1e-30, -1e-30, 1e-42, -1e-42, 1, -1], channels)
        bias = alpha * rng.integers(-3, 4, channels)
        self.norm.scale[...] = jnp.asarray(gamma, jnp.float32)
        self.norm.bias[...] = jnp.asarray(beta, jnp.float32)
        self.norm.mean[...] = jnp.asarray(mean, jnp.float32)
        self.norm.var[...] = jnp.asarray(
            10.0 ** rng.uniform(-9, 3, channels), jnp.float32
        )
        self.alpha = nnx.Param(jnp.asarray(alpha, jnp.float32))
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def __call__(self, sums):
        y = self.alpha[...] * sums + self.bias[...]
        y = nnx.relu(y) if self.relu else y
        return self.norm(y, use_running_average=True)


def as_evaluation(value):
    """Wrap `(params, sums) -> value` to return an `Evaluation` without max-pools."""

    def function(params, sums):
        v = value(params, sums)
        return thresholds.Evaluation([], v >= 0, jnp.isnan(v))

    return function


def integer_threshold(value, params, **sizes):
    found = thresholds.integer_threshold(as_evaluation(value), params, **sizes)
    return found and found.threshold


def float_threshold(value, params, *, features):
    found = thresholds.float_threshold(
        as_evaluation(value), params, features=features, slopes=[]
    )
    return found and found.threshold


def functional(module):
    graphdef, state = nnx.split(module)
    return lambda state, sums: nnx.merge(graphdef, state)(sums), state


def bits(threshold: Threshold, sums: np.ndarray) -> np.ndarray:
    """True where the sign is −1: the definition of a threshold, in NumPy."""
    flip = np.asarray(unpack_bits(threshold.flip, sums.shape[-1])) < 0
    return (sums < np.asarray(threshold.threshold)) ^ flip


@pytest.mark.parametrize("relu", [False, True])
def test_integer_thresholds_match_the_model(relu):
    bound, channels = 151, 2000
    value, params = functional(AffineBatchNorm(channels, relu=relu, seed=relu))
    found = integer_threshold(value, params, bound=bound, features=channels)
    sums = np.broadcast_to(np.arange(-bound, bound + 1)[:, None], (303, channels))
    values = jax.jit(value)(params, jnp.asarray(sums, jnp.float32))
    wanted = np.asarray(sign(values)) < 0
    np.testing.assert_array_equal(bits(found, sums), wanted)
    assert (np.asarray(values) == 0).sum() > 100, "nothing is exactly 0"
    rising = (wanted[0] & ~wanted[-1]).mean()
    falling = (~wanted[0] & wanted[-1]).mean()
    constant = (np.asarray(found.threshold) == np.iinfo(np.int32).min).mean()
    assert min(rising, falling, constant) > 0.05
    assert found.threshold.dtype == jnp.int32


@pytest.mark.parametrize("kind", ["integer", "float"])
def test_max_pool_commutes_with_thresholds(kind):
    bound, channels = 60, 400
    module = AffineBatchNorm(channels, relu=True, seed=5)
    graphdef, state = nnx.split(module)

    def function(state, sums):
        module = nnx.merge(graphdef, state)
        head = nnx.relu(module.alpha[...] * sums + module.bias[...])
        v = module.norm(head, use_running_average=True)
        return thresholds.Evaluation([head], v >= 0, jnp.isnan(v))

    if kind == "integer":
        found = thresholds.integer_threshold(
            function, state, bound=bound, features=channels, pools=1
        )
    else:
        slopes = [np.ones(channels, int)]
        found = thresholds.float_threshold(
            function, state, features=channels, slopes=slopes
        )
    rng = np.random.default_rng(0)
    sums = rng.integers(-bound, bound + 1, (300, 4, channels)) // rng.integers(
        1, 9, (300, 1, 1)
    )
    before = nnx.relu(module.alpha[...] * sums + module.bias[...])
    wanted = np.asarray(sign(module.norm(before.max(1), use_running_average=True))) < 0
    each = bits(found.threshold, sums)
    (falls,) = found.falls
    pooled = np.where(falls, each.any(1), each.all(1))
    np.testing.assert_array_equal(pooled, wanted)
    assert 0.05 < falls.mean() < 0.95


def test_float_thresholds_match_the_model():
    channels = 2000
    value, params = functional(AffineBatchNorm(channels, relu=True, seed=7))
    found = float_threshold(value, params, features=channels)
    boundary = np.asarray(found.threshold)
    rng = np.random.default_rng(0)
    sums = np.concatenate(
        [
            [
                np.nextafter(boundary, np.float32(-np.inf)),
                boundary,
                np.nextafter(boundary, np.float32(np.inf)),
            ],
            rng.normal(size=(50, channels)) * 10.0 ** rng.integers(-30, 30, (50, 1)),
            np.repeat([[0.0], [-0.0], [1e-42], [-1e-42], [3e38], [-3e38]], channels, 1),
        ]
    ).astype(np.float32)
    sums = np.where(np.isfinite(sums), sums, 0)
    # XLA compares on both sides, because it may flush subnormal numbers to 0.
    values = jax.jit(value)(params, sums)
    wanted = np.asarray(jax.jit(lambda v: sign(v) < 0)(values))
    got = np.asarray(jax.jit(jnp.less)(sums, boundary))
    got = got ^ (np.asarray(unpack_bits(found.flip, channels)) < 0)
    # Where α · sum overflows, a scale of 0 gives NaN, which has no sign.
    valid = ~np.isnan(values)
    assert valid.mean() > 0.99
    np.testing.assert_array_equal(got[valid], wanted[valid])
    assert 0.05 < np.isinf(boundary).mean() < 0.7
    assert found.threshold.dtype == jnp.float32


def test_float_codes_are_in_order():
    largest_code = int(np.float32(np.finfo(np.float32).max).view(np.int32))
    codes = np.array([-largest_code, -(2**23), -1, 0, 1, 2**23, largest_code])
    numbers = thresholds._from_codes(codes)
    tiny = np.finfo(np.float32).tiny
    largest = np.finfo(np.float32).max
    wanted = [-largest, -tiny, -1e-45, 0, 1e-45, tiny, largest]
    np.testing.assert_array_equal(numbers, np.float32(wanted))


def test_long_ranges_are_evaluated_in_chunks(monkeypatch):
    monkeypatch.setattr(thresholds, "_CHUNK", 70)
    value = lambda mean, sums: sums - mean  # noqa: E731
    mean = jnp.array([-100.0, -99.5, 0.0, 0.5, 99.5, 100.0, 101.0])
    found = integer_threshold(value, mean, bound=100, features=7)
    least = np.iinfo(np.int32).min
    np.testing.assert_array_equal(found.threshold, [least, -99, 0, 1, 100, 100, least])
    assert np.asarray(unpack_bits(found.flip, 7)).tolist() == [1, 1, 1, 1, 1, 1, -1]


def test_nonmonotone_or_nan_functions_have_no_threshold():
    def square(_, sums):
        return sums * sums - 9

    assert integer_threshold(square, None, bound=5, features=1) is None

    def function(_, sums):
        head = jnp.abs(sums)  # not monotone in the sum
        return thresholds.Evaluation([head], head >= 0, jnp.isnan(head))

    sizes = {"bound": 5, "features": 1}
    assert thresholds.integer_threshold(function, None, **sizes, pools=1) is None

    def nan(mask, sums):
        return jnp.where(mask, jnp.nan, sums)

    assert float_threshold(nan, jnp.array([False, True]), features=2) is None


def test_nan_from_overflow_is_not_a_sign():
    """Infinity times a scale of 0 is NaN, which does not count as a sign."""

    def value(scale, sums):
        return (sums * 1e10) * scale + 1

    found = float_threshold(value, jnp.zeros(3), features=3)
    assert np.isneginf(np.asarray(found.threshold)).all()
    assert not np.asarray(found.flip).any()
