from functools import partial

import bit_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax import ops

RNG = np.random.default_rng(0)


def test_sums_epilogue_is_the_identity():
    acc = jnp.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(ops.apply_epilogue(acc, ops.Sums()), acc)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_affine_scales_shifts_and_rectifies(relu, dtype):
    acc = RNG.integers(-1000, 1000, (4, 5)).astype(dtype)
    scale, bias = RNG.normal(size=(2, 5)).astype(np.float32)
    y = ops.apply_epilogue(acc, ops.Affine(jnp.asarray(scale), jnp.asarray(bias), relu))
    assert y.dtype == jnp.float32
    expected = scale.astype(float) * acc + bias
    expected = np.maximum(expected, 0) if relu else expected
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 70])
def test_threshold_compares_and_flips(dtype, channels):
    acc = RNG.integers(-3, 4, (6, channels)).astype(dtype)
    threshold = RNG.integers(-2, 3, channels).astype(dtype)
    flip = RNG.choice([-1.0, 1.0], channels)
    words = ops.apply_epilogue(
        acc, ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip))
    )
    value = np.where(acc < threshold, -1.0, 1.0) * flip
    np.testing.assert_array_equal(words, oracle.bits(value))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_the_smallest_threshold_makes_a_channel_constant(dtype):
    floating = jnp.issubdtype(dtype, jnp.floating)
    smallest = -jnp.inf if floating else jnp.iinfo(dtype).min
    extremes = [smallest, -5, 0, jnp.inf if floating else jnp.iinfo(dtype).max]
    acc = jnp.array([[value, value] for value in extremes], dtype)
    flip = ops.pack_bits(np.array([1.0, -1.0]))
    words = ops.apply_epilogue(acc, ops.Threshold(jnp.full(2, smallest, dtype), flip))
    np.testing.assert_array_equal(ops.unpack_bits(words, 2), [[1, -1]] * 4)


def test_nan_becomes_minus_one():
    threshold = ops.Threshold(jnp.zeros(2), jnp.zeros(1, jnp.uint32))
    words = ops.apply_epilogue(jnp.array([[jnp.nan, 1.0]]), threshold)
    np.testing.assert_array_equal(words, [[1]])


def test_epilogues_are_pytrees_with_static_relu():
    affine = ops.Affine(jnp.ones(3), jnp.zeros(3), relu=True)
    assert len(jax.tree.leaves(affine)) == 2
    assert jax.tree.map(lambda leaf: 2 * leaf, affine).relu
    assert jax.tree.leaves(ops.Sums()) == []


AFFINE = {"scale": jnp.ones(4), "bias": jnp.ones(4)}
THRESHOLD = {"threshold": jnp.zeros(4, jnp.int32), "flip": jnp.zeros(1, jnp.uint32)}


@pytest.mark.parametrize(
    ("epilogue", "error", "message"),
    [
        (None, TypeError, "Sums, Affine or Threshold as epilogue, got NoneType"),
        (
            ops.Affine(**AFFINE | {"scale": jnp.ones(3)}),
            ValueError,
            "Affine.scale of shape (4,), got (3,)",
        ),
        (
            ops.Affine(**AFFINE | {"bias": jnp.ones(4, jnp.bfloat16)}),
            TypeError,
            "Affine.bias of float32, got bfloat16",
        ),
        (
            ops.Threshold(**THRESHOLD | {"threshold": jnp.zeros(4)}),
            TypeError,
            "Threshold.threshold of int32, got float32",
        ),
        (
            ops.Threshold(**THRESHOLD | {"flip": jnp.zeros(4, jnp.uint32)}),
            ValueError,
            "Threshold.flip of shape (1,), got (4,)",
        ),
        (
            ops.Threshold(**THRESHOLD | {"flip": jnp.zeros(1, jnp.int32)}),
            TypeError,
            "Threshold.flip of uint32, got int32",
        ),
    ],
)
def test_invalid_epilogues_are_refused(epilogue, error, message):
    x, kernel = ops.sign_bits(jnp.ones((2, 3))), ops.pack_kernel(jnp.ones((3, 4)))
    with pytest.raises(error) as raised:
        ops.packed_matmul(x, kernel, epilogue)
    assert message in str(raised.value)
    assert str(raised.value).startswith("packed_matmul: ")


def test_a_gradient_for_a_scale_raises():
    x, kernel = ops.sign_bits(jnp.ones((2, 3))), ops.pack_kernel(jnp.ones((3, 4)))

    def loss(scale, backend):
        affine = ops.Affine(scale, jnp.zeros(4))
        return jnp.sum(ops.packed_matmul(x, kernel, affine, backend=backend))

    for backend in ops.available_backends():
        with pytest.raises(TypeError, match="packed_matmul: .* has no gradient"):
            jax.grad(partial(loss, backend=backend))(jnp.ones(4))
