import bit_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax import ops
from xnor_jax.ops import kernel as kernels
from xnor_jax.ops.kernel import columns, kernel_from_bytes, kernel_to_bytes


@pytest.mark.parametrize(
    ("window", "c_in", "c_out", "groups"),
    [((), 70, 40, 1), ((5,), 33, 64, 2), ((3, 2), 64, 33, 1), ((2, 1, 3), 5, 9, 3)],
)
def test_word_layout_matches_the_docstring(window, c_in, c_out, groups):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(*window, c_in, c_out)).astype(np.float32)
    packed = ops.pack_kernel(kernel, groups)
    per_group, count = c_out // groups, -(-c_in // 32)
    expected = oracle.kernel_words(kernel, groups)
    channel = c_out - 1  # in the last group, word by word
    panel, lane = divmod(per_group - 1, 32)
    np.testing.assert_array_equal(
        expected[-1, panel, ..., lane], oracle.bits(kernel[..., channel])
    )
    np.testing.assert_array_equal(packed.words, expected)
    assert (packed.in_features, packed.out_features) == (c_in, c_out)
    assert (packed.groups, packed.window) == (groups, window)
    np.testing.assert_array_equal(ops.unpack_kernel(packed), oracle.sign(kernel))
    flat = np.moveaxis(expected, 1, -2).reshape(groups, *window, count, -1)
    np.testing.assert_array_equal(columns(packed), flat[..., :per_group])


@pytest.mark.parametrize("block", [2**20, 1500, 70, 1])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((70, 40), 1), ((5, 33, 64), 2), ((3, 2, 64, 33), 1), ((2, 1, 3, 5, 9), 3)],
)
def test_kernel_bytes_hold_signs_in_c_order(shape, groups, block, monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", block)
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    stored = np.packbits(kernel.ravel() < 0, bitorder="little")
    packed = ops.pack_kernel(kernel, groups)
    np.testing.assert_array_equal(kernel_to_bytes(packed), stored)
    loaded = kernel_from_bytes(stored, shape, groups)
    assert jax.tree.structure(loaded) == jax.tree.structure(packed)
    np.testing.assert_array_equal(loaded.words, packed.words)


def test_packed_kernel_repr_omits_the_values():
    packed = ops.pack_kernel(jnp.ones((3, 2, 40, 33)))
    expected = (
        "PackedKernel(words=uint32[1,2,3,2,2,32], in_features=40, out_features=33)"
    )
    assert repr(packed) == expected
    assert "None" in repr(jax.tree.map(lambda _: None, packed))


def test_packed_kernel_is_a_pytree_of_words():
    packed = ops.pack_kernel(jnp.ones((3, 3, 8, 40)))
    (words,) = jax.tree.leaves(packed)
    assert words.dtype == jnp.uint32
    assert jax.jit(lambda k: k)(packed).out_features == 40


@pytest.mark.parametrize(
    ("kernel", "groups", "error", "message"),
    [
        (np.ones(3, np.float32), 1, ValueError, "[..., C_in, C_out]"),
        (np.ones((3, 0), np.float32), 1, ValueError, "a non-empty kernel"),
        (np.ones((3, 4), int), 1, TypeError, "floating point kernel"),
        (np.ones((3, 4), np.float32), 3, ValueError, "4 channels and 3 groups"),
        (
            np.ones((3, 4), np.float32),
            0,
            ValueError,
            "groups of 1 or more",
        ),
    ],
)
def test_invalid_kernels_are_refused(kernel, groups, error, message):
    with pytest.raises(error) as raised:
        ops.pack_kernel(kernel, groups)
    assert message in str(raised.value)
    assert str(raised.value).startswith("pack_kernel: ")


def test_a_gradient_through_a_packed_kernel_raises():
    def loss(kernel):
        return jnp.sum(ops.pack_kernel(kernel).words.astype(jnp.float32))

    with pytest.raises(TypeError, match="pack_kernel: .* has no gradient"):
        jax.grad(loss)(jnp.ones((3, 4)))
