"""BatchNorm with a backend, compared with Flax's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from xnor_jax import models
from xnor_jax.nn import BatchNorm
from xnor_jax.ops import cpu


def make_layers(channels, seed=0, backend="auto", **options):
    """This library's and Flax's layer, with the same random parameters and averages."""
    ours = BatchNorm(channels, backend=backend, rngs=nnx.Rngs(0), **options)
    layers = ours, nnx.BatchNorm(channels, rngs=nnx.Rngs(0), **options)
    for layer in layers:
        rng = np.random.default_rng(seed)
        for value in (layer.scale, layer.bias, layer.mean, layer.var):
            if value is not None:
                new = rng.uniform(0.5, 2, channels)
                value[...] = jnp.asarray(new, value[...].dtype)
    return layers


def run_with_gradients(layer, x, **options):
    """Return the result, gradients and averages; the number of kept arrays like `x`."""
    graph, params, rest = nnx.split(layer, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(params, x):
        def forward(params, x):
            layer = nnx.merge(graph, params, rest, copy=True)
            return layer(x, **options), nnx.state(layer, nnx.BatchStat)

        y, pull, statistics = jax.vjp(forward, params, x, has_aux=True)
        g = jax.random.normal(jax.random.key(1), y.shape, y.dtype)
        kept = sum(leaf.size == x.size for leaf in jax.tree.leaves(pull))
        return (y, pull(g), statistics), kept

    return run(params, x)


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["auto", "float"]),
    st.integers(0, 2**32 - 1),
)
def test_outputs_gradients_and_averages_match_flax(
    shape, channels, scaled, biased, backend, seed
):
    layers = make_layers(
        channels,
        seed,
        backend,
        use_scale=scaled,
        use_bias=biased,
        momentum=0.7,
        epsilon=0.01,
    )
    rng = np.random.default_rng(seed)
    x = jnp.float32(rng.normal(0.5, 2, (2, *shape, channels)))
    (ours, kept), (theirs, _) = (run_with_gradients(layer, x) for layer in layers)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-5)
    # Flax's layer also keeps `x − mean`.
    assert kept == 1


@pytest.mark.parametrize(
    ("options", "dtype", "call"),
    [
        ({"param_dtype": jnp.bfloat16}, jnp.float32, {}),
        ({}, jnp.bfloat16, {}),
        ({"use_running_average": True}, jnp.float32, {}),
        ({}, jnp.float32, {"use_running_average": True}),
        ({}, jnp.float32, {"mask": np.arange(6)[:, None] < 4}),
    ],
)
def test_evaluation_masks_and_dtypes_match_flax(options, dtype, call):
    x = jax.random.normal(jax.random.key(0), (6, 6), dtype)
    (ours, _), (theirs, _) = (
        run_with_gradients(layer, x, **call) for layer in make_layers(6, **options)
    )
    assert ours[0].dtype == theirs[0].dtype
    chex.assert_trees_all_equal(ours, theirs)


def test_cast_parameters_keep_their_dtype():
    layers = make_layers(6)
    for layer in layers:
        for constant in (layer.scale, layer.bias):
            constant[...] = constant[...].astype(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (6, 6))
    (ours, _), (theirs, _) = (run_with_gradients(layer, x) for layer in layers)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


def test_numpy_scalars_do_not_promote_dtypes():
    layer, _ = make_layers(6, epsilon=np.float64(0.01), momentum=np.float64(0.9))
    x = jax.random.normal(jax.random.key(0), (6, 6))
    with jax.enable_x64(True):
        (y, _, statistics), _ = run_with_gradients(layer, x)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((y, statistics))}
    assert dtypes == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("shape", [(2, 3, 4), (5,)])
def test_mismatched_inputs_are_refused(shape):
    layer, _ = make_layers(5)
    with pytest.raises(ValueError, match=r"BatchNorm: expected \[N, ..., 5\], got"):
        layer(jnp.ones(shape))


def test_models_forward_their_backend():
    def calls(backend):
        model = models.LeNet5(backend=backend, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        run = jax.jit(lambda state, x: nnx.merge(graph, state, copy=True)(x))
        return run.lower(state, jnp.ones((2, 28, 28, 1))).as_text().count("xnor_jax_")

    assert calls("float") == 0
    assert (calls("auto") > 0) == cpu.is_available()
