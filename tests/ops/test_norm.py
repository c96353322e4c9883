"""BatchNorm in training beside Flax's own."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xnor_jax import models
from xnor_jax.layers import batch_norm
from xnor_jax.ops import cpu, norm

needs_library = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)


def flax_norm(channels, seed=0, **options):
    """A layer whose constants and averages are not those of a new one."""
    layer = nnx.BatchNorm(channels, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(seed)
    for value in (layer.scale, layer.bias, layer.mean, layer.var):
        if value is not None:
            value[...] = jnp.asarray(rng.uniform(0.5, 2, channels), value[...].dtype)
    return layer


def all_of_it(normalize, layer, x):
    """Result, gradients and new averages; how many arrays like `x` it keeps."""
    graph, params, rest = nnx.split(layer, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, x):
        def of(params, x):
            layer = nnx.merge(graph, params, rest, copy=True)
            return normalize(layer, x), nnx.state(layer, nnx.BatchStat)

        y, pull, statistics = jax.vjp(of, params, x, has_aux=True)
        g = jax.random.normal(jax.random.key(1), y.shape, y.dtype)
        kept = sum(leaf.size == x.size for leaf in jax.tree.leaves(pull))
        return (y, pull(g), statistics), kept

    return run(params, x)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["auto", "float"]),
    st.integers(0, 2**32 - 1),
)
def test_it_does_what_flax_does(shape, channels, scaled, biased, backend, seed):
    layer = flax_norm(
        channels, seed, use_scale=scaled, use_bias=biased, momentum=0.7, epsilon=0.01
    )
    rng = np.random.default_rng(seed)
    x = jnp.float32(rng.normal(0.5, 2, (2, *shape, channels)))
    ours, kept = all_of_it(partial(batch_norm, backend=backend), layer, x)
    theirs, _ = all_of_it(lambda layer, x: layer(x), layer, x)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-5)
    # Flax's own keeps `x − mean` as well.
    assert kept == 1


def test_no_gradient_goes_through_a_variance_that_rounding_ate():
    """Such as that of a unit that is always off, or hardly moves far from 0."""
    noise = jax.random.normal(jax.random.key(0), (4, 3, 3, 4))
    x = jnp.array([0, 7, 1e4, 1e4]) + jnp.array([0, 0, 0, 1e-4]) * noise
    (_, _, variance), pull = jax.vjp(lambda x: norm.batch_norm(x, epsilon=1e-4), x)
    zeros = jnp.zeros(4)
    (d_x,) = pull((noise, zeros, zeros))
    through_mean = (noise - noise.mean((0, 1, 2))) * 100
    off = variance == 0
    assert off[:2].all()
    np.testing.assert_allclose(d_x[..., off], through_mean[..., off], rtol=1e-3)


def test_no_gradient_goes_through_the_statistics():
    x = jax.random.normal(jax.random.key(0), (4, 5))
    for at in (1, 2):
        gradient = jax.grad(lambda x, at=at: norm.batch_norm(x, epsilon=0.1)[at].sum())
        np.testing.assert_array_equal(gradient(x), 0)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"use_fast_variance": False}, jnp.float32),
        ({"axis": 0}, jnp.float32),
        ({"dtype": jnp.bfloat16}, jnp.float32),
        ({"param_dtype": jnp.bfloat16}, jnp.float32),
        ({}, jnp.bfloat16),
        ({"use_running_average": True}, jnp.float32),
        ({"promote_dtype": lambda arrays, dtype: arrays}, jnp.float32),
    ],
)
def test_what_flax_alone_knows_is_left_to_it(options, dtype):
    x = jax.random.normal(jax.random.key(0), (6, 6), dtype)
    layer = flax_norm(6, **options)
    ours, _ = all_of_it(batch_norm, layer, x)
    theirs, _ = all_of_it(lambda layer, x: layer(x), layer, x)
    assert ours[0].dtype == theirs[0].dtype
    chex.assert_trees_all_equal(ours, theirs)


def test_constants_that_were_cast_keep_their_dtype():
    layer = flax_norm(6)
    for constant in (layer.scale, layer.bias):
        constant[...] = constant[...].astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (6, 6))
    ours, _ = all_of_it(batch_norm, layer, x)
    theirs, _ = all_of_it(lambda layer, x: layer(x), layer, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


def test_numbers_of_numpy_are_plain_ones():
    layer = flax_norm(6, epsilon=np.float64(0.01), momentum=np.float64(0.9))
    x = jax.random.normal(jax.random.key(0), (6, 6))
    with jax.enable_x64(True):
        (y, _, statistics), _ = all_of_it(batch_norm, layer, x)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((y, statistics))}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_empty_and_flat_batches():
    for shape in ((0, 3), (3, 0)):
        y, mean, _ = norm.batch_norm(jnp.zeros(shape), epsilon=0.1)
        assert y.shape == shape and mean.shape == shape[1:]
    with pytest.raises(ValueError, match=r"expected \[N, ..., C\], got shape \(3,\)"):
        norm.batch_norm(jnp.ones(3), epsilon=0.1)
    # More pixels than an int32 counts.
    many = jax.ShapeDtypeStruct((2**20, 64, 64, 3), jnp.float32)
    y, *_ = jax.eval_shape(lambda x: norm.batch_norm(x, epsilon=0.1), many)
    assert y.shape == many.shape


def test_statistics_over_a_named_axis_are_left_to_flax():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    layer = nnx.BatchNorm(5, axis_name="i", rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def run(x):
        return batch_norm(nnx.merge(graph, state, copy=True), x)

    whole = norm.batch_norm(x.reshape(12, 5), epsilon=layer.epsilon)[0]
    mapped = jax.vmap(run, axis_name="i")(x)
    chex.assert_trees_all_close(mapped.reshape(12, 5), whole, rtol=1e-4, atol=1e-5)


def test_channels_that_do_not_fit_are_flaxs_error():
    with pytest.raises((TypeError, ValueError), match="incompatible shapes"):
        batch_norm(flax_norm(5), jnp.ones((2, 3, 4)))


def loss_and_gradients(x, scale, bias):
    def loss(x, scale, bias):
        y, *statistics = norm.batch_norm(x, scale, bias, epsilon=0.1)
        return jnp.sum(jnp.sin(y)), statistics

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)


@needs_library
@pytest.mark.parametrize("count", [3, 4])
def test_statistics_of_a_split_batch_are_of_all_of_it(count):
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


@needs_library
def test_under_vmap_and_shard_map():
    """There, as in Flax, each has the statistics of its own images."""
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
        # What is the same everywhere has the gradients of all devices together.
        return loss_and_gradients(x, scale, bias)[1]

    d_x, *others = gradients(x.reshape(8, 3, 3, 34), *constants)
    close(d_x.reshape(x.shape), stacked[1][0])
    close(others, [gradient.sum(0) for gradient in stacked[1][1:]])


def test_networks_hand_their_backend_down():
    def calls(backend):
        model = models.LeNet5(backend=backend, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x))
        return run.lower(state, jnp.ones((2, 28, 28, 1))).as_text().count("xnor_jax_")

    assert calls("float") == 0
    assert (calls("auto") > 0) == cpu.is_available()
