import itertools
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import trees
from absl.testing import parameterized
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_close, random_array, random_kernel

import xnor_jax as xnor
from xnor_jax import weights

VIEWS = {
    "mean_center": (xnor.mean_center, oracles.mean_center),
    "clamp": (xnor.clamp, oracles.clamp),
    "project": (xnor.project, oracles.project),
    "binarize": (xnor.binarize, oracles.binarize),
}
FUNCTIONS = {
    **VIEWS,
    "scale": (xnor.scale, oracles.scale),
    "sign": (xnor.sign, oracles.sign),
}

jit_and_eager: Any = chex.variants(with_jit=True, without_jit=True)
each_view = pytest.mark.parametrize("view", VIEWS)
each_dtype = pytest.mark.parametrize("dtype", oracles.DTYPES)
each_tree = pytest.mark.parametrize("kind", trees.TREES)
each_half = pytest.mark.parametrize("dtype", oracles.HALF)


def every_function(kernel):
    return {name: function(kernel) for name, (function, _) in FUNCTIONS.items()}


def assert_agrees_with_oracles(outputs, kernel):
    for name, out in outputs.items():
        assert out.dtype == kernel.dtype, name
        # Centring cancels: errors scale with the weights, not with the small result.
        size = np.abs(oracles.f64(kernel)).max()
        assert_close(out, FUNCTIONS[name][1](kernel), size=size, name=name)


class OracleTest(chex.TestCase):
    @jit_and_eager
    @parameterized.product(dtype=oracles.DTYPES)
    def test_every_function_agrees_with_numpy(self, dtype):
        run = self.variant(every_function)
        for seed, magnitude in enumerate([0.05, 0.7, 2.0]):
            kernel = random_kernel(seed, (3, 2, 5, 4), dtype, magnitude)
            assert_agrees_with_oracles(run(kernel), kernel)


def test_every_function_agrees_with_numpy_at_every_rank():
    kernels = [random_kernel(0, shape) for shape in oracles.SHAPES]
    outputs = jax.jit(lambda kernels: [every_function(w) for w in kernels])(kernels)
    for kernel, out in zip(kernels, outputs, strict=True):
        assert_agrees_with_oracles(out, kernel)


@settings(max_examples=5)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    inputs=st.integers(2, 9),
    features=st.integers(1, 7),
    seed=st.integers(0, 2**20),
)
def test_every_function_agrees_with_numpy_on_any_shape(leading, inputs, features, seed):
    kernel = random_kernel(seed, (*leading, inputs, features))
    assert_agrees_with_oracles(jax.jit(every_function)(kernel), kernel)


@each_view
def test_filters_are_independent(view):
    # A grouped kernel is [..., C_in / groups, C_out], its groups side by side in C_out.
    function = jax.jit(VIEWS[view][0])
    kernel = random_kernel(0, (3, 2, 3, 10))
    separate = np.concatenate(
        [function(group) for group in np.split(kernel, 5, -1)], -1
    )
    np.testing.assert_allclose(function(kernel), separate, rtol=1e-6, atol=1e-7)


def test_each_binary_filter_has_two_opposite_values():
    binary = np.asarray(xnor.binarize(random_kernel(3, (3, 3, 5, 4))))
    for feature in range(4):
        values = np.unique(binary[..., feature])
        assert values.tolist() == [-values[1], values[1]]


@each_half
def test_long_sums_neither_stall_nor_overflow_in_half_precision(dtype):
    # A bfloat16 running sum of ones stalls at 256; the float16 sum exceeds 65504.
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.uniform(100, 200, size=(1500, 2)).astype(jnp.dtype(dtype)))
    assert_agrees_with_oracles(jax.jit(every_function)(kernel), kernel)


@each_dtype
def test_every_function_works_under_strict_promotion(dtype):
    kernel = random_kernel(0, (3, 5, 2), dtype)
    with jax.numpy_dtype_promotion("strict"):
        outputs = jax.jit(every_function)(kernel)
        for rule in oracles.RULES:
            view = partial(xnor.binarize, rule=rule, multiplier=2.0)
            latent = jax.eval_shape(jax.grad(lambda w: view(w).sum()), kernel)  # noqa: B023
            assert latent.dtype == kernel.dtype
    assert_agrees_with_oracles(outputs, kernel)


@pytest.mark.parametrize("loop", ["jit", "scan"])
def test_a_rule_may_close_over_traced_values_in_a_loop(loop):
    kernel, g = random_kernel(0, (3, 5, 4)), random_array(1, (3, 5, 4))

    def loss(kernel, t):
        def term(total, _):
            view = xnor.binarize(kernel, rule=lambda w, g: t * g * w, multiplier=2 * t)
            return total + jnp.sum(view * g), None

        if loop == "jit":
            return jax.jit(term)(0.0, None)[0]
        return jax.lax.scan(term, 0.0, length=1)[0]

    found = jax.jit(jax.grad(loss))(kernel, 3.0)
    np.testing.assert_allclose(found, 18 * g * kernel, rtol=1e-6)


def test_double_precision_is_preserved():
    with jax.enable_x64(True):
        kernel = random_kernel(0, (3, 5, 2), "float64")
        assert_agrees_with_oracles(every_function(kernel), kernel)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numpy_kernels_are_accepted(name):
    function, oracle = FUNCTIONS[name]
    kernel = np.random.default_rng(0).normal(size=(3, 5, 2))  # float64, x64 off
    out = function(kernel)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, oracle(kernel), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bound", [0.25, 1, 3.0])
@each_dtype
def test_clamp_limits_values_to_the_bound(bound, dtype):
    kernel = random_kernel(0, (7, 5), dtype, magnitude=2 * bound)
    out = xnor.clamp(kernel, bound=bound)
    assert out.dtype == kernel.dtype
    assert np.array_equal(oracles.f64(out), oracles.clamp(kernel, bound))


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_clamp_refuses_non_positive_bounds(bound):
    with pytest.raises(ValueError, match="clamp: expected a bound above 0"):
        xnor.clamp(random_kernel(0, (3, 2)), bound=bound)


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match="clamp: expected a bound above 0, got 1j"):
        xnor.clamp(random_kernel(0, (3, 2)), bound=1j)
    with pytest.raises(TypeError, match="got 1j"):
        xnor.binarize(random_kernel(0, (3, 2)), multiplier=1j)


def test_project_centres_before_it_clamps():
    # The other order differs here: clamping first moves the mean.
    kernel = jnp.array([[3.0], [0.0], [0.0]])
    np.testing.assert_array_equal(xnor.project(kernel), [[1.0], [-1.0], [-1.0]])
    assert not np.array_equal(xnor.project(xnor.project(kernel)), xnor.project(kernel))


@pytest.mark.parametrize("dtype", [*oracles.DTYPES, "int8", "int32"])
def test_sign_has_two_values_and_both_zeros_are_positive(dtype):
    x = jnp.array([-3.0, -1.0, -0.0, 0.0, 1.0, 2.0]).astype(dtype)
    out = xnor.sign(x)
    assert out.dtype == x.dtype
    assert out.tolist() == [-1, -1, 1, 1, 1, 1]


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=5)
)
def test_sign_matches_numpy_on_normal_numbers(values):
    x = np.asarray(values[:5], np.float32)
    np.testing.assert_array_equal(xnor.sign(x), oracles.sign(x))


@pytest.mark.parametrize("dtype", [bool, complex])
def test_sign_refuses_other_than_real_numbers(dtype):
    with pytest.raises(
        TypeError, match=r"sign: expected real numbers, got (bool|comp)"
    ):
        xnor.sign(jnp.ones(3, dtype))


def test_sign_has_zero_gradient():
    gradient = jax.grad(lambda x: xnor.sign(x).sum())(jnp.array([-0.5, 0.0, 0.5]))
    assert not np.any(gradient)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2, 2), (3, 3, 1, 2), (10, 2)])
def test_binarize_minimizes_the_squared_error(shape):
    n = int(np.prod(shape[:-1]))
    every_sign = np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
    for seed in range(3):
        kernel = random_kernel(seed, shape)
        w = oracles.f64(kernel).reshape(n, -1)
        # The rule "ste" allows a single input channel.
        ours = oracles.f64(xnor.binarize(kernel, rule="ste")).reshape(n, -1)
        for feature in range(shape[-1]):
            f = w[:, feature]
            error = ((f - ours[:, feature]) ** 2).sum()
            best = every_sign @ f / n  # each pattern's own best scale
            grid = np.tile(np.linspace(-1.5, 1.5, 61)[:, None], len(every_sign))
            scales = np.concatenate([best[None], grid])
            others = f - scales[..., None] * every_sign
            assert error <= (others**2).sum(-1).min() + 1e-6


@each_tree
@each_view
def test_unmasked_leaves_are_returned_unchanged(kind, view):
    function, oracle = VIEWS[view]
    params, mask = trees.make(kind, magnitude=2.0)
    out = function(params, mask)
    assert jax.tree.structure(out) == jax.tree.structure(params)
    leaves = map(jax.tree.leaves, (mask, params, out))
    for binary, before, after in zip(*leaves, strict=True):
        if binary:
            assert_close(after, oracle(before), size=8.0)
        else:
            assert after is before


@each_tree
def test_tree_gradients_use_the_rule_only_on_masked_leaves(kind):
    params, mask = trees.make(kind)
    values, structure = jax.tree.flatten(params)
    floats = [i for i, value in enumerate(values) if trees.is_float(value)]
    cotangents = {i: random_array(i, values[i].shape) for i in floats}

    def loss(trained):
        tree = structure.unflatten([trained.get(i, x) for i, x in enumerate(values)])
        out = jax.tree.leaves(xnor.binarize(tree, mask))
        return sum((cotangents[i] * out[i]).sum() for i in floats)

    gradients = jax.jit(jax.grad(loss))({i: values[i] for i in floats})
    for i, binary in enumerate(jax.tree.leaves(mask)):
        if binary:
            args = "corrected", values[i], cotangents[i]
            size = oracles.rule_size(*args)
            assert_close(gradients[i], oracles.rule(*args), size=size)
        elif i in gradients:
            np.testing.assert_array_equal(gradients[i], cotangents[i])


def test_masks_may_be_trees_prefixes_or_callables():
    params, mask = trees.make("dict")
    prefix = {
        "first": False,
        "binary": [{"kernel": True, "bias": False}],
        "last": False,
    }
    numpy_bools = jax.tree.map(np.bool_, mask)
    jax_bools = jax.tree.map(jnp.asarray, mask)
    expected = xnor.binarize(params, mask)
    for equivalent in (
        prefix,
        lambda params: mask,
        lambda _: prefix,
        numpy_bools,
        jax_bools,
    ):
        chex.assert_trees_all_equal(xnor.binarize(params, equivalent), expected)


def test_no_mask_selects_all_leaves_and_false_none():
    params = {"a": random_kernel(0, (3, 2)), "b": random_kernel(1, (2, 5))}
    chex.assert_trees_all_equal(
        xnor.binarize(params), jax.tree.map(xnor.binarize, params)
    )
    chex.assert_trees_all_equal(xnor.binarize(params, True), xnor.binarize(params))
    out = xnor.binarize(params, False)
    assert out["a"] is params["a"] and out["b"] is params["b"]


def test_callable_module_of_bools_is_used_as_a_mask():
    params, mask = trees.make("equinox")
    assert callable(mask)
    expected = oracles.binarize(params.binary.kernel)
    assert_close(xnor.binarize(params, mask).binary.kernel, expected)


def test_unmasked_leaves_may_have_any_type():
    other_leaves = {"int": jnp.arange(3), "f": jnp.tanh, "text": "relu", "number": 2}
    params = {"kernel": random_kernel(0, (3, 2)), **other_leaves}
    mask = {"kernel": True, **dict.fromkeys(other_leaves, False)}
    for function, _ in VIEWS.values():
        out = function(params, mask)
        assert all(out[name] is leaf for name, leaf in other_leaves.items())


def test_binarize_does_not_modify_its_input():
    params, mask = trees.make("dict")
    copy = jax.tree.map(np.array, params)
    xnor.binarize(params, mask)
    chex.assert_trees_all_equal(params, copy)


@each_view
def test_vmap_over_kernels_matches_a_loop(view):
    function, _ = VIEWS[view]
    stacked = random_kernel(0, (3, 2, 5, 4))
    out = jax.jit(jax.vmap(function))(stacked)
    expected = jnp.stack([function(kernel) for kernel in stacked])
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


def test_vmapped_gradients_match_a_loop():
    stacked, g = random_kernel(0, (3, 5, 4)), random_array(1, (3, 5, 4))
    multipliers = jnp.array([0.5, 1.0, -3.0])

    def latent(kernel, g, multiplier):
        return jax.vjp(lambda w: xnor.binarize(w, multiplier=multiplier), kernel)[1](g)

    (out,) = jax.jit(jax.vmap(latent))(stacked, g, multipliers)
    for i in range(3):
        args = "corrected", stacked[i], g[i]
        expected = float(multipliers[i]) * oracles.rule(*args)
        assert_close(out[i], expected, size=3 * oracles.rule_size(*args))


def test_scan_over_layers_matches_the_unrolled_loop():
    layers, x = random_kernel(0, (3, 5, 5)), random_array(1, (2, 5))
    layer = lambda x, kernel: x @ xnor.binarize(kernel)  # noqa: E731

    def scanned(layers):
        out, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, layers)
        return (out**2).sum()

    def unrolled(layers):
        out = x
        for kernel in layers:
            out = layer(out, kernel)
        return (out**2).sum()

    value, gradient = jax.jit(jax.value_and_grad(scanned))(layers)
    expected_value, expected = jax.jit(jax.value_and_grad(unrolled))(layers)
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3 * value)


@pytest.mark.parametrize("axis", ["input channels", "output channels"])
def test_sharded_kernels_stay_sharded_with_equal_results(axis):
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("device",))
    spec = P(None, None, "device") if axis == "output channels" else P(None, "device")
    sharding = NamedSharding(mesh, spec)
    kernel = random_kernel(0, (3, 3 * len(devices), 5 * len(devices)))
    g = random_array(1, kernel.shape)

    def run(kernel, g):
        binary, pullback = jax.vjp(xnor.binarize, kernel)
        return xnor.project(kernel), binary, *pullback(g)

    outputs = jax.jit(run)(*jax.device_put((kernel, g), sharding))
    for out, expected in zip(outputs, jax.jit(run)(kernel, g), strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)
        assert out.sharding.is_equivalent_to(sharding, out.ndim)


@pytest.mark.parametrize(
    "spec",
    [P(None, "device"), pytest.param(P(None, None, "device"), marks=pytest.mark.slow)],
)
def test_kernels_on_explicit_mesh_axes_match_one_device(spec):
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("device",), axis_types=(AxisType.Explicit,))
    kernel = random_kernel(0, (3, 2 * count, 3 * count))

    def run(kernel):
        def loss(kernel):
            methods = weights.libra(kernel), weights.recu(kernel, tau=0.9)
            views = [*map(xnor.binarize, methods), xnor.project(kernel)]
            return sum(jnp.sum(view**3) for view in views)

        return xnor.binarize(kernel), jax.grad(loss)(kernel)

    expected = jax.jit(run)(kernel)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec)
        found = jax.jit(run)(jax.device_put(kernel, sharding))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in found)


def test_second_call_does_not_recompile(compilations):
    def run(seed):
        kernel = random_kernel(seed, (3, 5, 4))
        outputs = every_function(kernel)
        return outputs, jax.grad(lambda w: xnor.binarize(w).sum())(kernel)

    run(0)
    before = compilations()
    run(1)
    assert compilations() == before


def test_jit_traces_once_for_any_multiplier():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def latent(kernel, multiplier):
        return jax.grad(lambda w: xnor.binarize(w, multiplier=multiplier).sum())(kernel)

    expected = latent(random_kernel(0, (5, 3)), 1.0)
    np.testing.assert_allclose(latent(random_kernel(0, (5, 3)), 2.0), 2 * expected)


@each_view
@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (jnp.ones((3, 2), jnp.int32), TypeError, "floating point kernel, got int32"),
        (jnp.ones((3, 2), bool), TypeError, "floating point kernel, got bool"),
        (jnp.ones((3, 2), complex), TypeError, "floating point kernel, got complex64"),
        (jnp.tanh, TypeError, "floating point kernel"),
        (1.5, TypeError, "floating point kernel, got float"),
        (jnp.ones(3), ValueError, r"C_in, C_out\], got shape \(3,\)"),
        (jnp.ones((0, 3)), ValueError, r"non-empty kernel, got shape \(0, 3\)"),
    ],
)
def test_invalid_leaves_are_refused_by_name_and_path(view, leaf, error, message):
    params = {"layers": [{"kernel": random_kernel(0, (3, 2))}, {"kernel": leaf}]}
    function, _ = VIEWS[view]
    with pytest.raises(error, match=f"^{view}: .*{message}") as caught:
        function(params)
    assert "at ['layers'][1]['kernel']" in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 3, 3, 3, 2, 5)])
@each_view
def test_bias_shape_identifies_stacked_kernels(view, shape):
    function, oracle = VIEWS[view]
    lead = shape[:1] if len(shape) == 3 else shape[:2]
    stack = random_kernel(0, shape, magnitude=2.0)
    params = {"stack": {"kernel": stack, "bias": jnp.ones((*lead, shape[-1]))}}
    mask = {"stack": {"kernel": True, "bias": False}}
    out = jax.jit(partial(function, mask=mask))(params)["stack"]["kernel"]
    layers = stack.reshape(-1, *shape[len(lead) :])
    expected = np.stack([oracle(layer) for layer in layers])
    assert_close(out, expected.reshape(shape), size=2.0)


def test_stack_gradient_matches_its_layers():
    stack, g = random_kernel(0, (3, 4, 5)), random_array(1, (3, 4, 5))
    bias = jnp.ones((3, 5))
    mask = {"kernel": True, "bias": False}

    def loss(kernel):
        view = xnor.binarize({"kernel": kernel, "bias": bias}, mask)
        return (g * view["kernel"]).sum()

    gradient = jax.grad(loss)(stack)
    for layer, kernel, cotangent in zip(gradient, stack, g, strict=True):
        size = oracles.rule_size("corrected", kernel, cotangent)
        expected = oracles.rule("corrected", kernel, cotangent)
        assert_close(layer, expected, size=size)


@pytest.mark.parametrize(
    ("kernel", "bias"),
    [
        ((6, 4), (6,)),  # [C_out, C_in], Equinox's layout
        ((8, 2, 4), (2, 4)),  # several output axes
        ((4, 4, 8), (4, 8)),  # several output axes, or a stack of four
        ((6, 4, 3, 3), (6, 1, 1)),
        ((3, 4, 5), (2, 5)),
    ],
)
@pytest.mark.parametrize("name", ["kernel", "weight"])
@each_view
def test_mismatched_kernel_and_bias_are_refused(view, name, kernel, bias):
    layer = {name: random_kernel(0, kernel), "bias": jnp.ones(bias)}
    mask = {"layer": {name: True, "bias": False}}
    with pytest.raises(ValueError, match=f"^{view}: .* beside a bias") as caught:
        VIEWS[view][0]({"layer": layer}, mask)
    assert f"at ['layer']['{name}']" in str(caught.value)


@pytest.mark.parametrize("bias", [(5,), (1, 5), (1, 1, 5), ()])
def test_broadcast_bias_does_not_change_the_result(bias):
    kernel = random_kernel(0, (3, 4, 5))
    mask = {"kernel": True, "bias": False}
    out = xnor.binarize({"kernel": kernel, "bias": jnp.ones(bias)}, mask)["kernel"]
    np.testing.assert_array_equal(out, xnor.binarize(kernel))


def attention_params(kind, use_bias):
    if kind == "nnx":
        make = partial(nnx.MultiHeadAttention, 4, 4, 8, use_bias=use_bias, decode=False)
        return nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    layer = linen.MultiHeadDotProductAttention(4, qkv_features=8, use_bias=use_bias)
    return jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3, 4)))["params"]


@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("head", ["query", "key", "value", "out"])
def test_attention_projections_are_refused_by_path(kind, use_bias, head):
    # Rank 3, with two axes in or out: read as [..., C_in, C_out], these would get wrong
    # scales or be centred over the wrong axis.
    params = attention_params(kind, use_bias)
    mask = xnor.mask_by_path(params, lambda path, _: path == f"{head}/kernel")
    for view, (function, _) in VIEWS.items():
        with pytest.raises(ValueError, match=rf"^{view}: .*'{head}'\]\['kernel'\]"):
            function(params, mask)


def test_fused_attention_projections_are_dense_kernels():
    heads = {name: {"kernel": random_kernel(0, (4, 6))} for name in ("query", "out")}
    out = xnor.binarize(heads)
    assert_close(out["query"]["kernel"], oracles.binarize(heads["query"]["kernel"]))


@pytest.mark.parametrize("layer", ["DenseGeneral_0", "Einsum_12"])
def test_linen_attention_and_einsum_layers_are_refused(layer):
    params = {layer: {"kernel": jnp.ones((2, 3, 4))}}
    with pytest.raises(ValueError, match="attention or einsum layer"):
        xnor.binarize(params)


@pytest.mark.parametrize("view", ["mean_center", "project", "binarize"])
def test_one_input_channel_is_refused_by_name_and_path(view):
    params = {"depthwise": {"kernel": jnp.ones((3, 3, 1, 4))}}
    function, _ = VIEWS[view]
    with pytest.raises(ValueError, match="at least 2 input channels") as caught:
        function(params)
    assert str(caught.value).startswith(f"{view}: ")
    assert "['depthwise']['kernel']" in str(caught.value)


def test_clamp_and_scale_accept_one_input_channel():
    kernel = random_kernel(0, (3, 1, 4), magnitude=2.0)
    assert_close(xnor.clamp(kernel), oracles.clamp(kernel))
    assert_close(xnor.scale(kernel), oracles.scale(kernel))


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        ({"conv": {"kernel": True, "bais": False}}, "['conv']['bais']"),
        ({"conv": {"kernel": True}}, "['conv']['bias']"),
        ({"conv": {"kernel": {"deeper": True}, "bias": False}}, "['kernel']['deeper']"),
        ({"conv": {"kernel": True, "bias": None}}, "['conv']['bias']"),
    ],
)
@each_view
def test_mismatched_masks_are_refused_by_path(view, mask, path):
    params = {"conv": {"kernel": random_kernel(0, (3, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=f"^{view}: the mask") as caught:
        VIEWS[view][0](params, mask)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    "leaf", [1, "kernel", 0.5, jnp.array(1), np.array([True, True])]
)
def test_non_boolean_masks_are_refused_by_path(leaf):
    params = {"conv": {"kernel": random_kernel(0, (3, 2))}}
    with pytest.raises(TypeError, match="^clamp: .*mask") as caught:
        xnor.clamp(params, {"conv": {"kernel": leaf}})
    assert "['conv']['kernel']" in str(caught.value)


def test_a_traced_mask_is_refused_by_path():
    params = {"conv": {"kernel": random_kernel(0, (3, 2))}}
    run = jax.jit(partial(xnor.binarize, params))
    with pytest.raises(TypeError, match="binarize: the mask must be static") as caught:
        run({"conv": {"kernel": True}})
    assert "['conv']['kernel']" in str(caught.value)


def float64_and_filter_axes(kernel):
    kernel = np.asarray(kernel, np.float64)
    return kernel, tuple(range(kernel.ndim - 1))


@pytest.mark.parametrize("shape", [(3, 3, 5, 4), (9, 2), (1, 1, 2, 3)])
def test_libra_standardises_with_a_power_of_two_scale(shape):
    rng = np.random.default_rng(len(shape))
    kernel = (rng.normal(size=shape) * rng.uniform(0.1, 3, shape[-1])).astype("f") + 0.3
    w, axes = float64_and_filter_axes(kernel)
    standard = (w - w.mean(axes)) / w.std(axes)
    power = 2 ** np.round(np.log2(np.abs(standard).mean(axes)))
    bias = np.ones(shape[-1])
    mask = {"kernel": True, "bias": False}
    found = weights.libra({"kernel": kernel, "bias": bias}, mask)
    np.testing.assert_array_equal(found["bias"], bias)
    mean = np.abs(standard).mean(axes)
    expected = standard * power / mean
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        weights.binarize(found["kernel"]),
        power * np.where(standard < 0, -1, 1),
        rtol=1e-5,
    )


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e19, 1e35])
def test_libra_does_not_depend_on_the_scale(factor):
    kernel = random_kernel(0, (3, 3, 5, 4))
    found = weights.libra(kernel * factor)
    np.testing.assert_allclose(found, weights.libra(kernel), rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(weights.libra(w) ** 3))
    np.testing.assert_allclose(
        gradient(kernel * factor) * factor, gradient(kernel), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("value", [0.1, -0.3, 1e-25])
def test_libra_of_equal_weights_is_zero(value):
    # The rounded mean of 27 equal weights differs from them.
    kernel = jnp.stack([jnp.full(27, value), jnp.arange(27.0)], -1)
    found = weights.binarize(weights.libra(kernel))
    assert not found[:, 0].any() and found[:, 1].all()


@pytest.mark.slow
def test_libra_gradient_treats_the_scale_as_constant():
    rng = np.random.default_rng(0)
    kernel, g = rng.normal(size=(2, 4, 3, 5)).astype("f")
    found = jax.grad(lambda w: jnp.sum(weights.libra(w) * g))(jnp.asarray(kernel))
    w, axes = float64_and_filter_axes(kernel)
    standard = (w - w.mean(axes)) / w.std(axes)
    mean = np.abs(standard).mean(axes)
    factor = 2 ** np.round(np.log2(mean)) / mean
    projected = g - g.mean(axes) - standard * (g * standard).mean(axes)
    np.testing.assert_allclose(
        found, projected * factor / w.std(axes), rtol=1e-3, atol=1e-5
    )
    flat = jax.grad(lambda w: jnp.sum(weights.libra(w)))(jnp.full((3, 2), 0.5))
    assert not np.isnan(flat).any()


@pytest.mark.parametrize("tau", [0.6, 0.85, 1])
def test_recu_clamps_each_layer_between_its_quantiles(tau):
    rng = np.random.default_rng(0)
    params = {
        n: rng.normal(size=s).astype("f") for n, s in [("a", (3, 7, 5)), ("b", (4, 2))]
    }
    found = jax.jit(lambda p, t: weights.recu(p, tau=t))(params, tau)
    chex.assert_trees_all_close(found, weights.recu(params, tau=tau), rtol=1e-6)
    for name, kernel in params.items():
        bounds = np.quantile(kernel, 1 - tau), np.quantile(kernel, tau)
        np.testing.assert_allclose(found[name], np.clip(kernel, *bounds), rtol=1e-5)
    grads = jax.grad(lambda p: sum(map(jnp.sum, weights.recu(p, tau=0.85).values())))
    for name, grad in grads(params).items():
        low, high = np.quantile(params[name], 0.15), np.quantile(params[name], 0.85)
        inside = (params[name] > low) & (params[name] < high)
        np.testing.assert_array_equal(grad, inside)


@pytest.mark.parametrize("tau", [0.5, 1.1])
def test_recu_refuses_tau_out_of_range(tau):
    with pytest.raises(ValueError, match=r"recu: expected tau in \(0.5, 1\], got"):
        weights.recu(jnp.ones((2, 2)), tau=tau)


@pytest.mark.parametrize("value", [None, "1", np.ones(2)])
def test_a_bound_that_is_no_number_is_named(value):
    with pytest.raises(TypeError, match="^clamp: expected a bound above 0, got"):
        xnor.clamp(np.ones((2, 2)), bound=value)
    with pytest.raises(TypeError, match=r"^recu: expected tau in \(0.5, 1\], got"):
        weights.recu(np.ones((2, 2)), tau=value)


@pytest.mark.parametrize("binary", ["1w1a", "1w32a"])
@pytest.mark.parametrize(
    "method",
    [
        lambda w: w[:20],
        lambda w: w[:, :1],
        lambda w: w.sum(),
        lambda w: None,
        lambda w: (w,),
        lambda w: w > 0,
    ],
)
def test_a_weight_method_returns_a_kernel_of_the_same_shape(method, binary):
    layer = xnor.nn.BinaryLinear(
        32, 4, weight_method=method, precision=binary, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match=r"^weight_method: .* shape \(32, 4\), got"):
        layer(jnp.ones((3, 32)))


def test_a_weight_method_is_for_a_binary_kernel():
    with pytest.raises(ValueError, match="weight_method: expected 'latent' with"):
        xnor.nn.BinaryLinear(
            8, 4, weight_method="libra", precision="32w1a", rngs=nnx.Rngs(0)
        )
