from functools import partial
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx
from layer_oracles import (
    CONVS,
    RULES,
    Case,
    assert_close,
    awkward,
    call,
    conv,
    forward_and_gradients,
    linear,
    numpy_normal,
    quadratic_rule,
    run_forward_and_gradients,
)

import xnor_jax as xnor


@pytest.mark.parametrize("name", CONVS)
def test_binary_conv_and_gradients_match_formulas(name):
    case = Case(name)
    y, d_params, d_x = forward_and_gradients(case.layer, case.x, case.g)
    alpha = loop.scale(case.kernel)

    assert_close(y, alpha * case.sums + case.bias)
    sums = (np.asarray(y, np.float64) - case.bias) / alpha
    np.testing.assert_allclose(sums, case.sums, atol=1e-3)

    d_signs, d_binarized = case.gradients(case.g)
    assert_close(d_x, d_signs * (np.abs(case.x) < 1))
    assert_close(d_params["kernel"][...], loop.corrected(case.kernel, d_binarized))
    assert_close(d_params["bias"][...], case.g.sum(tuple(range(case.g.ndim - 1))))


@pytest.mark.parametrize("rule", RULES)
def test_kernel_gradient_applies_the_rule(rule: str):
    rule_option = quadratic_rule if rule == "of the user" else rule
    case = Case("groups", rule=rule_option, multiplier=3.0)
    _, d_params, _ = forward_and_gradients(case.layer, case.x, case.g)
    _, d_binarized = case.gradients(case.g)
    expected = 3 * RULES[rule](case.kernel, d_binarized)
    assert_close(d_params["kernel"][...], expected)


@pytest.mark.parametrize("name", ["rank 1", "rank 2", "same", "groups"])
def test_input_scale_matches_the_xnor_net_formula(name: str):
    case = Case(name, input_scale=True)
    y, d_params, d_x = forward_and_gradients(case.layer, case.x, case.g)
    window = case.layer.kernel_size
    box = np.full((*window, 1, 1), 1 / np.prod(window))
    mean = np.abs(case.x).mean(-1, keepdims=True)
    k = loop.conv(mean, box, *case.geometry)
    product = loop.scale(case.kernel) * case.sums

    assert_close(y, k * product + case.bias)
    # The product rule: through the signs with K fixed, and through K. At 0 any slope
    # in [−1, 1] is a subgradient of |x|.
    d_signs, d_binarized = case.gradients(case.g * k)
    d_k = (case.g * product).sum(-1, keepdims=True)
    d_mean, _ = loop.conv_gradients(mean, box, d_k, *case.geometry)
    channels = case.x.shape[-1]
    expected = d_signs * (np.abs(case.x) < 1) + d_mean * np.sign(case.x) / channels
    assert_close(np.asarray(d_x)[case.x != 0], expected[case.x != 0])
    assert_close(d_params["kernel"][...], loop.corrected(case.kernel, d_binarized))


def test_input_scale_gradient_matches_finite_differences():
    # With every |x| above 1 the signs pass no gradient: only K's is left, which finite
    # differences can check.
    case = Case("rank 2", input_scale=True)
    x = case.x + np.sign(case.x + 0.5) * 2
    assert np.abs(x).min() > 1.4
    forward = jax.jit(lambda x: (case.layer(x) * jnp.float32(case.g)).sum())
    _, _, d_x = forward_and_gradients(case.layer, x, case.g)
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = rng.normal(size=x.shape) / 20
        ahead, behind = (forward(jnp.float32(x + d * direction)) for d in (1, -1))
        np.testing.assert_allclose(
            (ahead - behind) / 2, np.vdot(d_x, direction), rtol=2e-3, atol=2e-3
        )


@hypothesis.given(
    st.integers(2, 70),
    st.integers(1, 9),
    st.sampled_from([(), (3,), (2, 3)]),
    st.data(),
)
def test_binary_linear_and_gradients_match_formulas(c, c_out, batch, data):
    rule = data.draw(st.sampled_from(list(loop.RULES)))
    rng = np.random.default_rng(c * c_out)
    layer = linear(c, c_out, rule=rule)
    w, x = awkward(rng, (c, c_out)), awkward(rng, (*batch, c))
    bias = rng.normal(size=c_out)
    layer.kernel[...], layer.bias[...] = jnp.float32(w), jnp.float32(bias)
    sums = loop.sign(x) @ loop.sign(w)
    g = rng.normal(size=sums.shape)

    y, d_params, d_x = forward_and_gradients(layer, x, g)

    assert_close(y, loop.scale(w) * sums + bias)
    assert_close(d_x, g @ loop.binarize(w).T * (np.abs(x) < 1))
    d_binarized = loop.sign(x).reshape(-1, c).T @ g.reshape(-1, c_out)
    assert_close(d_params["kernel"][...], loop.RULES[rule](w, d_binarized))
    assert_close(d_params["bias"][...], g.reshape(-1, c_out).sum(0))


def test_input_scale_of_a_dense_layer_is_the_mean_magnitude():
    rng = np.random.default_rng(0)
    layer = linear(7, 5, input_scale=True)
    w, x, g = awkward(rng, (7, 5)), awkward(rng, (3, 7)), rng.normal(size=(3, 5))
    layer.kernel[...] = jnp.float32(w)
    y, _, d_x = forward_and_gradients(layer, x, g)
    k = np.abs(x).mean(-1, keepdims=True)
    product = loop.sign(x) @ loop.binarize(w)
    assert_close(y, k * product)
    through_signs = (g * k) @ loop.binarize(w).T * (np.abs(x) < 1)
    expected = through_signs + (g * product).sum(-1, keepdims=True) * np.sign(x) / 7
    assert_close(np.asarray(d_x)[x != 0], expected[x != 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["patches", "XLA", "groups", "dense"])
def test_sums_are_exact_in_half_precision(name: str, dtype):
    rng = np.random.default_rng(0)
    groups = 2 if name == "groups" else 1
    channels = {"patches": 55, "XLA": 67, "groups": 134, "dense": 601}[name]
    if name == "dense":
        layer = linear(channels, 4, dtype=dtype)
        x = rng.choice([-1.0, 1.0], p=[0.1, 0.9], size=(3, channels))
    else:
        layer = conv(channels, 4, padding=1, feature_group_count=groups, dtype=dtype)
        x = rng.choice([-1.0, 1.0], p=[0.1, 0.9], size=(2, 5, 5, channels))
    # Scales of two bits are exact in any dtype; mostly positive signs give sums beyond
    # 256, where bfloat16 skips odd integers.
    alpha = 0.75 * 2.0 ** -np.arange(4)
    w = alpha * rng.choice([-1.0, 1.0], p=[0.1, 0.9], size=layer.kernel.shape)
    layer.kernel[...] = jnp.float32(w)
    if name == "dense":
        sums = x @ loop.sign(w)
    else:
        pads = ((1, 1), (1, 1))
        sums = loop.conv(x, loop.sign(w), (1, 1), pads, (1, 1), groups)
    assert ((sums > 256) & (sums % 2 == 1)).any()

    y = call(layer, jnp.float32(x))

    chex.assert_type(y, dtype)
    # Use the library's float32 scale: an error of one ulp decides rounding ties.
    scale = np.asarray(jax.jit(xnor.scale)(layer.kernel[...]))
    np.testing.assert_allclose(scale, alpha, rtol=1e-6)
    once_rounded = jnp.asarray(scale * np.float32(sums), dtype)
    np.testing.assert_array_equal(y, once_rounded)


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "x_dtype", "expected"),
    [
        (None, jnp.float32, jnp.float32, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (None, jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
        (jnp.float16, jnp.float32, jnp.float16, jnp.float16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
    ],
)
def test_dtypes_of_output_and_gradients(dtype, param_dtype, x_dtype, expected):
    settings: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    x = jax.ShapeDtypeStruct((1, 3, 3, 3), x_dtype)
    g = jax.ShapeDtypeStruct((1, 3, 3, 2), jnp.float32)
    for layer in (
        conv(3, 2, (2, 2), input_scale=True, **settings),
        conv(3, 2, (2, 2), binary=False, **settings),
    ):
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        run = partial(run_forward_and_gradients, graph)
        _, y, d_params, d_x = jax.eval_shape(run, params, rest, x, g)
        assert (y.dtype, d_x.dtype) == (expected, x_dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(d_params)} == {
            jnp.dtype(param_dtype)
        }


def test_half_precision_keeps_signs_of_small_weights():
    # float16 has no number between 0 and 6e-8: a kernel cast before its sign is taken
    # would lose the signs of small weights.
    layer = linear(3, 1, dtype=jnp.float16)
    layer.kernel[...] = jnp.float32([[-1e-9], [-1.0], [-0.5]])
    np.testing.assert_array_equal(call(layer, jnp.ones((1, 3))), [[-1.5]])


def test_large_multiplier_does_not_overflow_half_precision():
    # 1e9 is the published AlexNet recipe's multiplier; latent kernels are float32.
    gradients = []
    for dtype in (jnp.float16, jnp.float32):
        layer = linear(9, 2, multiplier=1e9, dtype=dtype)
        x = np.random.default_rng(0).normal(size=(4, 9))
        _, d_params, _ = forward_and_gradients(layer, x, np.ones((4, 2)))
        gradients.append(d_params["kernel"][...])
    assert_close(*gradients, tolerance=1e-2)


def test_half_precision_input_does_not_round_the_box_filter():
    layer = conv(2, 3, input_scale=True, dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 5, 2)), jnp.bfloat16)
    assert_close(call(layer, x), call(layer, x.astype(jnp.float32)), tolerance=1e-6)


def test_input_scale_accepts_integers():
    layer = conv(2, 3, input_scale=True)
    x = np.random.default_rng(0).integers(-3, 4, size=(1, 5, 5, 2))
    y = call(layer, jnp.asarray(x, jnp.int32))
    assert_close(y, call(layer, jnp.float32(x)), tolerance=1e-6)


def hadamard(size: int) -> np.ndarray:
    """A matrix of signs that is `size` times its own inverse."""
    return (
        np.array([[1.0]])
        if size == 1
        else np.kron([[1, 1], [1, -1]], hadamard(size // 2))
    )


def dropped_signs(layer: nnx.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inputs that a layer with a Hadamard kernel multiplies; `x`'s gradient."""
    size = x.shape[-1]
    g = np.broadcast_to(hadamard(size).sum(0), x.shape)
    y, _, d_x = forward_and_gradients(layer, x, g)
    return np.asarray(y) @ hadamard(size) / size, np.asarray(d_x) / size


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_dropout_drops_signs_only_in_training(rate):
    size = 16
    layer = conv(size, size, (1, 1), dropout=rate)
    layer.kernel[...] = jnp.float32(hadamard(size).reshape(layer.kernel.shape))
    x = awkward(np.random.default_rng(0), (4, 5, 5, size))
    signs, survivor_scale = loop.sign(x), 1 / (1 - rate)

    layer.train()
    first, d_x = dropped_signs(layer, x)
    second, _ = dropped_signs(layer, x)
    for dropped in (first, second):
        kept = np.abs(dropped) > 0.5
        np.testing.assert_allclose(dropped, signs * survivor_scale * kept, atol=1e-5)
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / x.size)
    assert (np.abs(first - second) > 0.5).any()
    kept = np.abs(first) > 0.5
    np.testing.assert_allclose(d_x, kept * survivor_scale * (np.abs(x) < 1), atol=1e-5)

    layer.eval()
    evaluated, d_x = dropped_signs(layer, x)
    np.testing.assert_allclose(evaluated, signs, atol=1e-5)
    np.testing.assert_allclose(d_x, np.abs(x) < 1, atol=1e-5)


def test_dropout_of_half_keeps_sums_exact():
    layer = linear(64, 64, dropout=0.5, dtype=jnp.bfloat16)
    layer.kernel[...] = jnp.float32(hadamard(64))
    y = np.asarray(call(layer, jnp.ones((9, 64))), np.float64)
    assert set(np.unique(y @ hadamard(64) / 64)) == {0.0, 2.0}


@pytest.mark.parametrize("name", ["rank 2", "groups", "1×1"])
def test_float_twin_matches_the_plain_layer(name: str):
    case = Case(name, binary=False)
    y, d_params, d_x = forward_and_gradients(case.layer, case.x, case.g)
    arguments = (*case.geometry, case.groups)
    assert_close(y, loop.conv(case.x, case.kernel, *arguments) + case.bias)
    expected = loop.conv_gradients(case.x, case.kernel, case.g, *arguments)
    assert_close(d_x, expected[0])
    assert_close(d_params["kernel"][...], expected[1])


def test_dense_float_twin_is_linear_and_drops_inputs():
    rng = np.random.default_rng(0)
    layer = linear(16, 16, binary=False, dropout=0.5)
    layer.kernel[...] = jnp.float32(hadamard(16))
    x = rng.normal(size=(30, 16))
    dropped, _ = dropped_signs(layer, x)
    # Dropout applies to the input, not to its sign; a dropped one leaves only rounding.
    kept = np.abs(dropped) > 1e-5
    np.testing.assert_allclose(dropped, 2 * x * kept, atol=1e-5)
    assert 0.3 < kept.mean() < 0.7
    layer.eval()
    assert_close(call(layer, jnp.float32(x)), x @ hadamard(16))


def test_use_bias_false_creates_no_parameter():
    for layer in (
        conv(3, 2, use_bias=False),
        linear(3, 2, use_bias=False),
    ):
        assert list(nnx.state(layer, nnx.Param)) == ["kernel"]
    case = Case("rank 2", use_bias=False)
    y = call(case.layer, jnp.float32(case.x))
    assert_close(y, loop.scale(case.kernel) * case.sums)


def test_parameters_have_flax_shapes_and_initializers():
    layer = xnor.nn.BinaryConv(
        6,
        9,
        (3, 2),
        feature_group_count=3,
        kernel_init=nnx.initializers.constant(0.25),
        bias_init=nnx.initializers.constant(-2.0),
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )
    assert layer.kernel.shape == (3, 2, 2, 9)
    assert (layer.kernel[...] == 0.25).all() and (layer.bias[...] == -2).all()
    chex.assert_type([layer.kernel[...], layer.bias[...]], jnp.bfloat16)
    plain = xnor.nn.BinaryLinear(4, 3, rngs=nnx.Rngs(7))
    other = xnor.nn.BinaryLinear(4, 3, rngs=nnx.Rngs(8))
    assert len(np.unique(plain.kernel[...])) == 12
    assert (plain.kernel[...] != other.kernel[...]).all()


def test_vmap_over_inputs_matches_a_loop():
    case = Case("rank 2", input_scale=True)
    inputs = jnp.float32(np.stack([case.x, case.x[::-1] / 2, -case.x]))

    def run(x):
        y, pullback = jax.vjp(case.layer, x)
        return y, pullback(jnp.float32(case.g))[0]

    batched = jax.jit(jax.vmap(run))(inputs)
    looped = [jax.jit(run)(x) for x in inputs]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    chex.assert_trees_all_close(batched, looped, rtol=1e-5, atol=1e-4)


def test_vmap_over_kernels_matches_a_loop():
    layer = linear(5, 3)
    graph, params = nnx.split(layer)
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(4, 5)))
    stacked = jax.tree.map(
        lambda p: jnp.float32(rng.normal(size=(6, *p.shape))), params
    )
    run = jax.jit(lambda params: nnx.merge(graph, params)(x))
    batched = jax.jit(jax.vmap(run))(stacked)
    looped = [run(jax.tree.map(lambda p: p[i], stacked)) for i in range(6)]  # noqa: B023
    assert_close(batched, np.float64(looped))


def test_settings_given_as_lists_work_with_jit():
    layer = conv(3, 2, [3, 3], strides=[2, 1], padding=[[1, 1], [0, 2]])
    x = jnp.float32(np.random.default_rng(0).normal(size=(1, 5, 5, 3)))
    same = conv(3, 2, (3, 3), strides=(2, 1), padding=((1, 1), (0, 2)))
    np.testing.assert_array_equal(call(layer, x), call(same, x))


CONSTRUCTOR_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "groups, in": (
        {"in_features": 5, "feature_group_count": 2},
        "feature_group_count: 2",
    ),
    "groups, out": (
        {"out_features": 5, "feature_group_count": 2},
        "feature_group_count",
    ),
    "no group": ({"feature_group_count": 0}, "feature_group_count"),
    "negative groups": ({"feature_group_count": -2}, "feature_group_count"),
    "no channel": ({"in_features": 0}, "BinaryConv: expected in_features of 1"),
    "part of a channel": ({"out_features": 6.0}, "BinaryConv: expected out_features"),
    "rank 4": ({"kernel_size": (1, 2, 3, 4)}, "kernel_size: expected 1 to 3"),
    "rank 0": ({"kernel_size": ()}, "kernel_size: expected 1 to 3"),
    "empty window": ({"kernel_size": (0, 3)}, "kernel_size"),
    "strides, count": ({"strides": (1, 1, 1)}, "strides of 1 or more.* 2 spatial axes"),
    "strides, value": ({"strides": 0}, "strides of 1 or more"),
    "dilation": ({"kernel_dilation": (1,)}, "kernel_dilation of 1 or more"),
    "dropout": ({"dropout": 1.5}, "dropout"),
}


@pytest.mark.parametrize("name", CONSTRUCTOR_ERRORS)
def test_invalid_settings_are_refused_by_name(name: str):
    options, message = CONSTRUCTOR_ERRORS[name]
    options = {"in_features": 4, "out_features": 6, "kernel_size": (3, 3), **options}
    with pytest.raises(ValueError, match=message):
        xnor.nn.BinaryConv(**options, kernel_init=numpy_normal, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("sizes", [(0, 4), (4, -1), (4.0, 4), (4, True)])
def test_dense_layer_refuses_invalid_features(sizes):
    with pytest.raises(ValueError, match="BinaryLinear: expected .*_features of 1"):
        xnor.nn.BinaryLinear(*sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 5, 5, 3),
            r"BinaryConv: expected \[N, 2 spatial axes, 4\].*\(1, 5, 5, 3\)",
        ),
        ((5, 5, 4), "BinaryConv: expected"),
        ((1, 5, 5, 5, 4), "BinaryConv: expected"),
        ((1, 2, 2, 4), r"BinaryConv: .*\(3, 3\) over \(2, 2\)"),
    ],
)
def test_conv_refuses_mismatched_inputs(shape, message):
    layer = conv(4, 6, strides=2, padding="VALID")
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(2, 5), (4, 3), ()])
def test_dense_layer_refuses_mismatched_inputs(shape):
    layer = linear(4, 6)
    with pytest.raises(ValueError, match=r"BinaryLinear: expected \[..., 4\]"):
        layer(jnp.ones(shape))


def test_invalid_padding_and_rules_are_refused_by_name():
    with pytest.raises(ValueError, match="padding .*'SAME'.* got 'same'"):
        conv(4, 6, padding="same")
    with pytest.raises(ValueError, match="unknown name 'best'"):
        linear(4, 6, rule="best")
    with pytest.raises(ValueError, match="surrogate: unknown name 'best'"):
        linear(4, 6, surrogate="best")


def test_depthwise_convolution_needs_a_rule_without_centring():
    # One channel per group: the factor 1 − 1/C_in of the default rule is 0.
    for rule in ("corrected", "paper", xnor.rules.paper):
        with pytest.raises(
            ValueError,
            match=r"BinaryConv: .*at least 2 input channels per filter, got 1.*"
            r'rule="exact"',
        ):
            conv(4, 8, feature_group_count=4, rule=rule)
    with pytest.raises(ValueError, match="BinaryLinear: .*at least 2 input channels"):
        linear(1, 8)
    assert conv(4, 8, feature_group_count=4, binary=False).kernel.shape[-2] == 1
    layer = conv(4, 8, feature_group_count=4, rule="exact")
    x = awkward(np.random.default_rng(0), (1, 5, 5, 4))
    y, d_params, _ = forward_and_gradients(layer, x, np.ones((1, 5, 5, 8)))
    assert y.shape == (1, 5, 5, 8)
    assert np.abs(d_params["kernel"][...]).max() > 0


@pytest.mark.parametrize("precision", ["1w32a", "32w1a"])
def test_single_operand_binarization_matches_loops(precision):
    case = Case("groups", precision=precision, rule="ste", surrogate="approx")
    y, d_params, d_x = forward_and_gradients(case.layer, case.x, case.g)
    signed_x, signed_kernel = precision == "32w1a", precision == "1w32a"
    x = loop.sign(case.x) if signed_x else case.x
    kernel = loop.binarize(case.kernel) if signed_kernel else case.kernel
    sums = loop.conv(x, kernel, *case.geometry, case.groups)
    assert_close(y, sums + case.bias)
    d_operand, d_kernel = loop.conv_gradients(
        x, kernel, case.g, *case.geometry, case.groups
    )
    slope = np.maximum(2 - 2 * np.abs(case.x), 0) if signed_x else 1
    assert_close(d_x, d_operand * slope)
    inside = np.abs(case.kernel) <= 1 if signed_kernel else 1
    assert_close(d_params["kernel"][...], d_kernel * inside)


@pytest.mark.parametrize("method", ["libra", lambda kernel: kernel - 0.25])
def test_weight_method_transforms_the_latent_kernel(method):
    case = Case("valid", weight_method=method, rule="ste")
    y, d_params, _ = forward_and_gradients(case.layer, case.x, case.g)
    transform = xnor.weights.libra if method == "libra" else method
    latent, pullback = jax.vjp(transform, jnp.float32(case.kernel))
    case.kernel = np.asarray(latent, np.float64)
    binarized = loop.binarize(case.kernel)
    sums = loop.conv(loop.sign(case.x), binarized, *case.geometry)
    assert_close(y, sums + case.bias)
    inside = np.abs(case.kernel) <= 1
    (expected,) = pullback(jnp.float32(case.gradients(case.g)[1] * inside))
    assert_close(d_params["kernel"][...], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "2w2a"},
            "precision: expected one of 1w1a, 1w32a, 32w1a, got '2w2a'",
        ),
        (
            {"weight_method": "best"},
            "weight_method: unknown name 'best'; expected one of latent, libra, recu",
        ),
        ({"precision": "1w32a", "input_scale": True}, "input_scale: expected False"),
        (
            {"precision": "32w1a", "compute_dtype": jnp.bfloat16},
            "compute_dtype: expected float32 with precision 32w1a",
        ),
    ],
)
def test_invalid_precisions_and_methods_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear(4, 3, **options)


@pytest.mark.parametrize("name", ["cpuu", "xla", None])
def test_non_training_backends_are_refused_at_construction(name):
    for make in (
        lambda _: conv(4, 5, backend=name),
        lambda _: linear(4, 5, backend=name),
        lambda rngs: xnor.nn.Conv(4, 5, (3, 3), backend=name, rngs=rngs),
        lambda rngs: xnor.nn.BatchNorm(4, backend=name, rngs=rngs),
        # The name is checked even where Flax computes the layer.
        lambda _: linear(4, 5, backend=name, binary=False),
        lambda rngs: xnor.models.LeNet5(backend=name, rngs=rngs),
    ):
        with pytest.raises(ValueError, match="backend.*expected one of auto, float, c"):
            make(nnx.Rngs(0))
