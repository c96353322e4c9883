import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax import ops
from xnor_jax.ops import xla


@pytest.mark.parametrize("count", [1, 24, 32, 33, 48, 49, 100])
@pytest.mark.parametrize("groups", [1, 3])
def test_popcounts_match_numpy_for_any_word_count(count, groups):
    rng = np.random.default_rng(count)
    a = rng.integers(0, 2**32, (5, groups, count), dtype=np.uint32)
    b = rng.integers(0, 2**32, (groups, count, 7), dtype=np.uint32)
    expected = np.bitwise_count(a[..., None] ^ b).sum(axis=2, dtype=np.int64)
    np.testing.assert_array_equal(jax.jit(xla.popcounts)(a, b), expected)


def test_no_array_has_the_size_of_the_broadcast_product():
    rows, words, columns = 128, 72, 256
    text = jax.jit(xla.popcounts).lower(
        jnp.zeros((rows, 1, words), jnp.uint32),
        jnp.zeros((1, words, columns), jnp.uint32),
    )
    largest = max(
        int(np.prod([int(n) for n in shape.split("x")[:-1]]))
        for line in text.as_text().split("tensor<")[1:]
        for shape in [line.split(">")[0]]
        if "x" in shape
    )
    assert largest == rows * columns


def test_the_program_does_not_grow_with_the_filter():
    def line_count(length):
        a, b = jnp.ones((2, length)), jnp.ones((length, 3))
        run = jax.jit(lambda a, b: ops.binary_matmul(a, b, backend="xla"))
        return len(run.lower(a, b).as_text().splitlines())

    assert line_count(100_000) < 1.2 * line_count(24 * 32 * 2)
