"""The residual sum, which is kept in memory only in training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xnor_jax.nn import residual_sum
from xnor_jax.ops import cpu

needs_library = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)


def draw(*shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return tuple(jax.random.normal(key, shape, dtype) for key in keys)


def gradients(add, y, shortcut):
    return jax.grad(lambda y, x: jnp.sum(jnp.sin(add(y, x))), argnums=(0, 1))(
        y, shortcut
    )


@pytest.mark.parametrize("shape", [(3,), (0, 4), (2, 5, 5, 3)])
@pytest.mark.parametrize("backend", ["auto", "float"])
def test_sum_and_gradients_match_jax(shape, backend):
    y, shortcut = draw(*shape)

    def add(y, x):
        return residual_sum(y, x, backend=backend)

    np.testing.assert_array_equal(add(y, shortcut), y + shortcut)
    chex.assert_trees_all_close(
        jax.jit(lambda *a: gradients(add, *a))(y, shortcut),
        gradients(jnp.add, y, shortcut),
        rtol=1e-6,
    )


def test_mixed_dtypes_promote_as_in_jax():
    y, shortcut = draw(2, 3)
    y = y.astype(jnp.bfloat16)
    assert residual_sum(y, shortcut).dtype == jnp.float32
    found, expected = (gradients(add, y, shortcut) for add in (residual_sum, jnp.add))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


@needs_library
def test_only_training_keeps_the_sum():
    y, shortcut = draw(2, 5, 5, 3)

    def two_sums(y, x):
        return residual_sum(residual_sum(y, x), x)

    def keep_calls(function):
        return jax.jit(function).lower(y, shortcut).as_text().count("@xnor_jax_keep")

    assert keep_calls(two_sums) == 0
    # One for each sum, and one for its gradient.
    assert keep_calls(lambda y, x: gradients(two_sums, y, x)) == 4
    assert keep_calls(lambda *a: gradients(jnp.add, *a)) == 0


@needs_library
def test_bfloat16_gradients_match_under_remat():
    y, shortcut = draw(2, 5, 3, dtype=jnp.bfloat16)
    add = jax.checkpoint(residual_sum)
    chex.assert_trees_all_equal(
        jax.jit(lambda *a: gradients(add, *a))(y, shortcut),
        gradients(jnp.add, y, shortcut),
    )


@needs_library
@pytest.mark.parametrize("shape", [(4,), (4, 6, 3)])
def test_gradients_match_under_vmap(shape):
    y, shortcut = draw(*shape)
    mapped = jax.vmap(lambda *a: gradients(residual_sum, *a))(y, shortcut)
    chex.assert_trees_all_close(mapped, gradients(jnp.add, y, shortcut), rtol=1e-6)


@needs_library
def test_gradients_match_on_two_devices():
    y, shortcut = draw(4, 6, 4)
    expected = gradients(jnp.add, y, shortcut)
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    images = NamedSharding(mesh, P("i"))
    run = jax.jit(lambda *a: gradients(residual_sum, *a))
    found = run(*jax.device_put((y, shortcut), images))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert all(array.sharding == images for array in found)
    mapped = jax.shard_map(
        lambda *a: gradients(residual_sum, *a),
        mesh=mesh,
        in_specs=P("i"),
        out_specs=P("i"),
    )
    chex.assert_trees_all_close(mapped(y, shortcut), expected, rtol=1e-6)
    explicit_mesh = jax.make_mesh(
        (2,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    with jax.set_mesh(explicit_mesh):
        for spec in (P("i"), P(None, None, "i")):
            args = jax.device_put((y, shortcut), NamedSharding(explicit_mesh, spec))
            assert jax.typeof(residual_sum(*args)).sharding.spec[: len(spec)] == tuple(
                spec
            )
            found = run(*args)
            chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3,\)"):
        residual_sum(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match="'xla' has no gradients"):
        residual_sum(jnp.ones(3), jnp.ones(3), backend="xla")
