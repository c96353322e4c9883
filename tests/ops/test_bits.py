import bit_oracles as oracle
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xnor_jax as xnor
from xnor_jax import ops
from xnor_jax.ops import bits


@hypothesis.given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=1, max_dims=3, max_side=70),
        elements=st.sampled_from([-2.0, -0.5, -0.0, 0.0, 1.0]),
    ),
    st.data(),
)
def test_words_hold_the_signs_and_unpack_to_them(x, data):
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    words = ops.pack_bits(x, axis)
    expected = np.moveaxis(oracle.bits(np.moveaxis(x, axis, -1)), -1, axis)
    np.testing.assert_array_equal(words, expected)
    assert words.dtype == jnp.uint32
    signs = ops.unpack_bits(words, x.shape[axis], axis)
    np.testing.assert_array_equal(signs, oracle.sign(x))


def test_random_bits_are_fair_and_independent():
    shape = (40, 50, 70)
    drawn = np.asarray(bits.random_bits(jax.random.key(0), shape))
    assert drawn.shape == shape and drawn.dtype == bool
    others = np.asarray(bits.random_bits(jax.random.key(1), shape))
    # Each channel's share of ones; how often neighbours, and two draws, agree.
    pairs = drawn[..., 1:] == drawn[..., :-1], drawn[1:] == drawn[:-1], drawn == others
    for even in (drawn, *pairs):
        share = even.mean((0, 1))
        assert (abs(share - 0.5) < 5 * 0.5 / np.sqrt(even[..., 0].size)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("backend", ops.available_backends())
def test_packed_signs_match_the_signs_in_training(dtype, backend):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    normal = float(jnp.finfo(dtype).tiny)
    values = [0.0, -0.0, tiny, -tiny, normal, -normal, -1e-42, 1.0, -1.0, np.nan]
    # Repeated beyond one word: a vector loop and its remainder must agree.
    x = jnp.asarray(np.array([*values, np.inf, -np.inf] * 7), dtype)
    packed = ops.sign_bits(x, backend=backend)
    signs = ops.unpack_bits(packed.words, packed.size)
    np.testing.assert_array_equal(signs, np.asarray(xnor.sign(x), np.float32))
    np.testing.assert_array_equal(ops.pack_bits(x), packed.words)


def test_float64_signs_are_taken_without_rounding():
    with jax.enable_x64(True):
        x = jnp.array([-1e-300, 1e-300, -1.0], jnp.float64)
        assert x.dtype == jnp.float64
        np.testing.assert_array_equal(ops.sign_bits(x).words, [5])
        np.testing.assert_array_equal(ops.pack_bits(x), [5])
        y = ops.binary_matmul(x[None], jnp.ones((3, 1), jnp.float64))
        np.testing.assert_array_equal(y, [[-1]])


@pytest.mark.parametrize("size", [1, 31, 32, 33, 63, 64, 65, 128, 129])
def test_unused_bits_are_zero(size):
    words = np.asarray(ops.pack_bits(-np.ones((2, size), np.float32)))
    assert all(sum(int(w).bit_count() for w in row) == size for row in words)


def test_integers_pack_by_their_sign():
    np.testing.assert_array_equal(ops.pack_bits(np.array([3, -1, 0, -7])), [0b1010])


def test_unpack_bits_supports_other_dtypes():
    signs = ops.unpack_bits(np.array([2], np.uint32), 3, dtype=jnp.bfloat16)
    assert signs.dtype == jnp.bfloat16
    np.testing.assert_array_equal(signs.astype(np.float32), [1, -1, 1])


def test_bits_repr_omits_the_values():
    assert repr(bits.Bits(jnp.zeros((5, 2), jnp.uint32), 33)) == (
        "Bits(words=uint32[5,2], size=33)"
    )


def test_bits_are_a_pytree_of_words():
    packed = ops.sign_bits(np.ones((2, 5, 40), np.float32))
    (words,) = jax.tree.leaves(packed)
    assert words.shape == (2, 5, 2)
    assert packed.shape == (2, 5, 40)
    assert jax.tree.map(lambda w: w, packed).size == 40


def test_sign_bits_accepts_an_empty_batch():
    assert ops.sign_bits(np.ones((0, 3, 40), np.float32)).words.shape == (0, 3, 2)


def test_words_for_counts_whole_words():
    assert [bits.words_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.pack_bits(1.0), ValueError, "an axis of an array of shape ()"),
        (lambda: ops.pack_bits(jnp.ones(3), 1), ValueError, "got 1"),
        (lambda: ops.pack_bits(jnp.ones(3, complex)), TypeError, "real numbers"),
        (lambda: ops.pack_bits(jnp.ones(3, bool)), TypeError, "got bool"),
        (lambda: ops.unpack_bits(jnp.ones(3), 3), TypeError, "uint32 words"),
        (
            lambda: ops.unpack_bits(jnp.ones(3, jnp.uint32), 33),
            ValueError,
            "expected 2 words for 33 signs, got 3",
        ),
        (
            lambda: ops.unpack_bits(jnp.ones(1, jnp.uint32), 3, dtype=bool),
            TypeError,
            "holds −1 and +1, got bool",
        ),
        (
            lambda: ops.unpack_bits(jnp.ones(1, jnp.uint32), 3, dtype=jnp.uint8),
            TypeError,
            "got uint8",
        ),
        (lambda: ops.sign_bits(1.0), ValueError, "at least one axis"),
        (lambda: ops.sign_bits(np.ones(3, int)), TypeError, "floating point"),
    ],
)
def test_invalid_arguments_are_refused(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


@pytest.mark.parametrize("pack", [ops.pack_bits, lambda x: ops.sign_bits(x).words])
def test_a_gradient_through_bits_raises(pack):
    def loss(x):
        return jnp.sum(pack(x).astype(jnp.float32))

    with pytest.raises(TypeError, match="has no gradient"):
        jax.grad(loss)(jnp.ones(3))
