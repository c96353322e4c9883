"""BatchNorm in training, compared with Flax's."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xnor_jax.ops import cpu, norm

needs_library = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)


@pytest.mark.slow
def test_gradient_ignores_a_variance_lost_to_rounding():
    """Examples are a unit that is always off, or one almost constant far from 0."""
    noise = jax.random.normal(jax.random.key(0), (4, 3, 3, 4))
    x = jnp.array([0, 7, 1e4, 1e4]) + jnp.array([0, 0, 0, 1e-4]) * noise
    (_, _, variance), pull = jax.vjp(lambda x: norm.batch_norm(x, epsilon=1e-4), x)
    zeros = jnp.zeros(4)
    (d_x,) = pull((noise, zeros, zeros))
    through_mean = (noise - noise.mean((0, 1, 2))) * 100
    constant = variance == 0
    assert constant[:2].all()
    np.testing.assert_allclose(
        d_x[..., constant], through_mean[..., constant], rtol=1e-3
    )


def test_statistics_have_no_gradient():
    x = jax.random.normal(jax.random.key(0), (4, 5))
    for output in (1, 2):
        gradient = jax.grad(
            lambda x, output=output: norm.batch_norm(x, epsilon=0.1)[output].sum()
        )
        np.testing.assert_array_equal(gradient(x), 0)


def test_empty_batches_are_accepted_and_vectors_refused():
    for shape in ((0, 3), (3, 0)):
        y, mean, _ = norm.batch_norm(jnp.zeros(shape), epsilon=0.1)
        assert y.shape == shape and mean.shape == shape[1:]
    with pytest.raises(ValueError, match=r"expected \[N, ..., C\], got shape \(3,\)"):
        norm.batch_norm(jnp.ones(3), epsilon=0.1)
    # More pixels than an int32 can count.
    large = jax.ShapeDtypeStruct((2**20, 64, 64, 3), jnp.float32)
    y, *_ = jax.eval_shape(lambda x: norm.batch_norm(x, epsilon=0.1), large)
    assert y.shape == large.shape


def loss_and_gradients(x, scale, bias):
    def loss(x, scale, bias):
        y, *statistics = norm.batch_norm(x, scale, bias, epsilon=0.1)
        return jnp.sum(jnp.sin(y)), statistics

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)


@needs_library
@pytest.mark.parametrize("count", [3, 4])
def test_statistics_cover_a_sharded_batch(count):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 34))
    scale, bias = jnp.linspace(0.5, 2, 34), jnp.linspace(-1, 1, 34)
    run = jax.jit(lambda x, *constants: loss_and_gradients(x[:count], *constants))
    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    split = jax.device_put(x, NamedSharding(mesh, P("i")))
    chex.assert_trees_all_close(
        run(split, scale, bias), run(x, scale, bias), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@needs_library
def test_vmap_and_shard_map_use_local_statistics():
    """Each call uses the statistics of its own images, as in Flax."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 3, 3, 34))
    constants = jnp.linspace(0.5, 2, 34), jnp.linspace(-1, 1, 34)
    each = [loss_and_gradients(part, *constants) for part in x]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    mapped = jax.vmap(loss_and_gradients, (0, None, None))(x, *constants)
    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
    close(mapped, stacked)
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")

    @partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()[:2]), ("i",)),
        in_specs=(P("i"), P(), P()),
        out_specs=(P("i"), P(), P()),
    )
    def gradients(x, scale, bias):
        # Gradients of replicated arguments are summed over the devices.
        return loss_and_gradients(x, scale, bias)[1]

    d_x, *others = gradients(x.reshape(8, 3, 3, 34), *constants)
    close(d_x.reshape(x.shape), stacked[1][0])
    close(others, [gradient.sum(0) for gradient in stacked[1][1:]])
