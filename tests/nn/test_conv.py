"""Convolutions with a backend, compared with Flax's."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layer_oracles import numpy_normal

from xnor_jax import masks
from xnor_jax.nn import BinaryConv, Conv
from xnor_jax.ops import cpu

CONVS: dict[str, dict[str, Any]] = {
    "same": {"kernel_size": (3, 2), "padding": "SAME", "strides": 2},
    "valid": {"kernel_size": (3, 3), "padding": "VALID", "kernel_dilation": (1, 2)},
    "pairs": {"kernel_size": (3, 3), "padding": ((0, 2), (1, 0)), "strides": (2, 1)},
    "groups": {"kernel_size": (3, 3), "feature_group_count": 2},
    "1×1": {"kernel_size": (1, 1), "strides": (1, 2)},
    "rank 1": {"kernel_size": 3, "padding": 1},
    "rank 3": {"kernel_size": (2, 1, 2)},
    "wide": {"kernel_size": (5, 5), "in_features": 22, "padding": 1},
    "no bias": {"kernel_size": (3, 3), "use_bias": False},
    "bfloat16": {"kernel_size": (3, 3), "dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("backend", ["auto", "float"])
def test_values_and_gradients_match_flax(name: str, backend: str):
    options: dict[str, Any] = {
        "in_features": 4,
        "out_features": 6,
        "kernel_init": numpy_normal,
        "bias_init": numpy_normal,
        **CONVS[name],
    }
    ours = Conv(**options, backend=backend, rngs=nnx.Rngs(0))
    theirs = nnx.Conv(**options, rngs=nnx.Rngs(0))
    rank = len(ours.kernel_size)
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(3, 7, 8, 5)[: rank + 1] + (ours.in_features,)))

    @nnx.jit
    def run(layer, x):
        graph, state = nnx.split(layer, nnx.Param)
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return y, pull(jnp.cos(jnp.arange(y.size)).astype(y.dtype).reshape(y.shape))

    (y, found), (expected, gradients) = run(ours, x), run(theirs, x)
    half = name == "bfloat16"
    tolerance: dict[str, Any] = {"rtol": 2e-2 if half else 1e-3, "atol": 1e-4}
    if half:
        tolerance["atol"] = 0.2
    chex.assert_trees_all_equal_shapes_and_dtypes((y, found), (expected, gradients))
    chex.assert_trees_all_close((y, found), (expected, gradients), **tolerance)


def test_any_number_of_batch_axes_is_accepted():
    layer = Conv(2, 3, (3, 3), backend="float", rngs=nnx.Rngs(0))
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 3, 5, 6, 2)))
    flat = layer(x.reshape(6, 5, 6, 2))
    np.testing.assert_allclose(layer(x), flat.reshape(2, 3, 5, 6, 3), rtol=1e-6)
    np.testing.assert_allclose(layer(x[0, 0]), flat[0], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not cpu.is_available(), reason="the cpu backend was not built")
def test_bias_is_fused_into_the_convolution():
    layer = Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    text = jax.jit(layer).lower(jnp.ones((2, 6, 6, 3))).as_text()
    assert "xnor_jax_run" in text and "stablehlo.add" not in text
    plain = Conv(3, 8, (3, 3), backend="float", rngs=nnx.Rngs(0))
    assert "xnor_jax_run" not in jax.jit(plain).lower(jnp.ones((2, 6, 6, 3))).as_text()


@pytest.mark.parametrize("shape", [(2, 5, 5, 3), (5, 4), (1, 2, 2, 4)])
def test_mismatched_inputs_are_refused(shape):
    layer = Conv(4, 6, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Conv: expected"):
        layer(jnp.ones(shape))


@pytest.mark.parametrize("groups", [0, 3, True, 2**31])
def test_invalid_groups_are_refused(groups):
    with pytest.raises(ValueError, match="Conv: .*feature_group_count"):
        Conv(4, 8, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layer", [Conv, BinaryConv])
@pytest.mark.parametrize("size", [0, (3, 0), (), (1, 1, 1, 1), 3.0, "33"])
def test_invalid_windows_are_refused(layer, size):
    with pytest.raises(ValueError, match="Conv: .*kernel_size"):
        layer(4, 8, size, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layer", [Conv, BinaryConv])
def test_windows_may_be_numpy_integers(layer):
    for size in (np.int64(3), np.array([3, 2])):
        kernel = layer(4, 8, size, rngs=nnx.Rngs(0)).kernel
        assert kernel.shape == (*np.atleast_1d(size), 4, 8)


def test_unsupported_flax_settings_are_refused():
    for options in ({"mask": jnp.ones(1)}, {"input_dilation": 2}, {"precision": 1}):
        with pytest.raises(TypeError, match=next(iter(options))):
            Conv(4, 6, (3, 3), **options, rngs=nnx.Rngs(0))


def test_conv_kernels_are_inner_kernels():
    model = nnx.List([Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)) for _ in range(3)])
    inner = jax.tree.leaves_with_path(masks.inner_kernels(model))
    assert [path[0].key for path, on in inner if on] == [1]
