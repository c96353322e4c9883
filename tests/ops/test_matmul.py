from functools import partial

import bit_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from xnor_jax import ops

BACKENDS = ("auto", *ops.available_backends())


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def product(a, b):
    return oracle.sign(a) @ oracle.sign(b)


# Around word boundaries, and `xla`'s passes: one of up to 32 words, more of up to 24.
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 130, 1024, 1025, 2400])
@pytest.mark.parametrize("backend", ops.available_backends())
def test_sums_of_any_length_match_the_oracle(size, backend):
    a, b = draw((5, size)), draw((size, 35), 1)
    y = ops.binary_matmul(a, b, backend=backend)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, product(a, b))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_axes_are_kept(shape, backend):
    a, b = draw((*shape, 40)), draw((40, 6), 1)
    y = ops.binary_matmul(a, b, backend=backend)
    np.testing.assert_array_equal(y, product(a, b))


@pytest.mark.parametrize("length", [100_000, 99_999])
@pytest.mark.parametrize("backend", BACKENDS)
def test_largest_sums_are_exact(length, backend):
    a = np.ones((2, length), np.float32)
    b = np.stack([-a[0], a[0], a[0]], axis=1)
    b[0, 2] = -1
    y = ops.binary_matmul(a, b, backend=backend)
    np.testing.assert_array_equal(y, [[-length, length, length - 2]] * 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_input_gives_an_empty_result(backend):
    y = ops.binary_matmul(jnp.ones((2, 0, 5)), jnp.ones((5, 3)), backend=backend)
    assert (y.shape, y.dtype) == ((2, 0, 3), jnp.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_under_jit_matches_the_oracle(backend):
    a, b = draw((3, 4, 70)), draw((3, 70, 33), 1)
    y = jax.jit(jax.vmap(partial(ops.binary_matmul, backend=backend)))(a, b)
    np.testing.assert_array_equal(y, product(a, b))


@pytest.mark.parametrize("size", [70, 2000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_shard_map_over_rows_and_over_columns(size, backend):
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(devices), ("x",))
    a, b = draw((4, size)), draw((size, 6), 1)
    call = partial(ops.binary_matmul, backend=backend)
    for specs, out in [((P("x"), P()), P("x")), ((P(), P(None, "x")), P(None, "x"))]:
        sharded = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=out)
        np.testing.assert_array_equal(jax.jit(sharded)(a, b), product(a, b))


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_raises(argument, backend):
    def loss(a, b):
        y = ops.binary_matmul(a, b, backend=backend)
        return jnp.sum(y.astype(jnp.float32))

    with pytest.raises(TypeError, match="binary_matmul: .* has no gradient"):
        jax.grad(loss, argument)(jnp.ones((2, 3)), jnp.ones((3, 2)))


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (np.ones(3, int), np.ones((3, 2)), TypeError, "floating point a, got int"),
        (np.ones(3), np.ones((3, 2), int), TypeError, "floating point b, got int"),
        (np.ones((2, 4)), np.ones((3, 2)), ValueError, "got (2, 4) and (3, 2)"),
        (np.ones((2, 3)), np.ones(3), ValueError, "a [..., K] and b [K, N]"),
        (np.float32(1), np.ones((1, 2)), ValueError, "a [..., K]"),
        (np.ones((2, 0)), np.ones((0, 2)), ValueError, "a non-empty kernel"),
    ],
)
def test_invalid_arguments_are_refused(a, b, error, message):
    with pytest.raises(error) as raised:
        ops.binary_matmul(a, b)
    assert str(raised.value).startswith("binary_matmul: ")
    assert message in str(raised.value)
