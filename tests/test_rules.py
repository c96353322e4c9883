from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close, random_array, random_kernel

import xnor_jax as xnor
from xnor_jax import rules

jit_and_eager: Any = chex.variants(with_jit=True, without_jit=True)
each_rule = pytest.mark.parametrize("name", oracles.RULES)
each_half = pytest.mark.parametrize("dtype", oracles.HALF)


def every_rule(kernel, grad):
    return {name: rules.get(name)(kernel, grad) for name in oracles.RULES}


def assert_rule_agrees(out, name, kernel, grad, multiplier=1.0):
    size = abs(multiplier) * oracles.rule_size(name, kernel, grad)
    expected = multiplier * oracles.rule(name, kernel, grad)
    assert_close(out, expected, size=size, name=name)


def pull_back(kernel, grad, **options):
    pull = lambda w, g: jax.vjp(lambda w: xnor.binarize(w, **options), w)[1](g)[0]  # noqa: E731
    return jax.jit(pull)(kernel, grad)


class OracleTest(chex.TestCase):
    @jit_and_eager
    @parameterized.product(dtype=oracles.DTYPES)
    def test_every_rule_agrees_with_numpy(self, dtype):
        run = self.variant(every_rule)
        for seed, magnitude in enumerate([0.05, 0.7, 2.0]):
            kernel = random_kernel(seed, (3, 2, 5, 4), dtype, magnitude)
            grad = random_array(seed, kernel.shape, dtype)
            for name, out in run(kernel, grad).items():
                assert out.dtype == grad.dtype
                assert_rule_agrees(out, name, kernel, grad)


def test_every_rule_agrees_with_numpy_at_every_rank():
    kernels = [random_kernel(0, shape) for shape in oracles.SHAPES]
    grads = [random_array(1, shape) for shape in oracles.SHAPES]
    outputs = jax.jit(lambda ws, gs: list(map(every_rule, ws, gs)))(kernels, grads)
    for kernel, grad, out in zip(kernels, grads, outputs, strict=True):
        for name in oracles.RULES:
            assert_rule_agrees(out[name], name, kernel, grad)


@settings(max_examples=5)
@given(
    leading=st.lists(st.integers(1, 4), max_size=3),
    inputs=st.integers(2, 9),
    features=st.integers(1, 7),
    seed=st.integers(0, 2**20),
)
def test_every_rule_agrees_with_numpy_on_any_shape(leading, inputs, features, seed):
    kernel = random_kernel(seed, (*leading, inputs, features))
    grad = random_array(seed + 1, kernel.shape)
    for name, out in jax.jit(every_rule)(kernel, grad).items():
        assert_rule_agrees(out, name, kernel, grad)


@pytest.mark.parametrize(
    ("name", "inside", "at_one", "beyond"),
    # By hand: one filter w = (.5, -1, 1.5, 0), so α = 3/4, n = C_in = 4, factor 3.
    # g = (1, 2, 4, 8) and s = (1, -1, 1, 1), so mean(s·g) = 11/4.
    [
        ("corrected", 3 * (0.75 + 2.75), 3 * (1.5 - 2.75), 3 * 2.75),
        ("paper", 3 * (0.75 + 0.25), 3 * 2 * 0.25, 3 * 4 * 0.25),
        ("exact", 0.75 + 2.75, 1.5 - 2.75, 2.75),
        ("ste", 1.0, 2.0, 0.0),
    ],
)
def test_rules_match_hand_computed_values(name, inside, at_one, beyond):
    kernel = jnp.array([0.5, -1.0, 1.5, 0.0])[:, None]
    grad = jnp.array([1.0, 2.0, 4.0, 8.0])[:, None]
    out = np.asarray(jax.jit(rules.get(name))(kernel, grad))
    np.testing.assert_allclose(out[:3, 0], [inside, at_one, beyond], rtol=1e-6)


def test_exact_matches_jax_autodiff():
    # Straight-through sign by stop_gradient, α by plain autodiff with the slope of |w|
    # taken as +1 at 0, where sign is +1.
    def view(w):
        passed = jnp.where(jnp.abs(w) <= 1, w, 0.0)
        signs = passed + jax.lax.stop_gradient(jnp.where(w < 0, -1.0, 1.0) - passed)
        alpha = jnp.where(w < 0, -w, w).mean(axis=(0, 1))
        return alpha * signs

    kernel, grad = (
        random_kernel(0, (3, 5, 4), magnitude=1.0),
        random_array(1, (3, 5, 4)),
    )
    (expected,) = jax.jit(lambda w, g: jax.vjp(view, w)[1](g))(kernel, grad)
    np.testing.assert_allclose(
        rules.exact(kernel, grad), expected, rtol=1e-5, atol=1e-6
    )


def test_corrected_is_a_multiple_of_exact():
    kernel, grad = random_kernel(0, (3, 5, 4)), random_array(1, (3, 5, 4))
    factor = (1 - 1 / 5) * 15
    np.testing.assert_allclose(
        rules.corrected(kernel, grad), factor * rules.exact(kernel, grad), rtol=1e-5
    )


@each_rule
def test_filters_are_independent(name):
    rule = jax.jit(rules.get(name))
    kernel, grad = random_kernel(0, (3, 3, 6)), random_array(1, (3, 3, 6))
    groups = zip(np.split(kernel, 3, -1), np.split(grad, 3, -1), strict=True)
    separate = np.concatenate([rule(w, g) for w, g in groups], -1)
    np.testing.assert_allclose(rule(kernel, grad), separate, rtol=1e-5, atol=1e-6)


@each_rule
@pytest.mark.parametrize("dtype", oracles.DTYPES)
def test_gradient_through_binarize_matches_the_rule(name, dtype):
    kernel = random_kernel(0, (3, 5, 4), dtype)
    grad = random_array(1, kernel.shape, dtype)
    out = pull_back(kernel, grad, rule=name)
    assert out.dtype == kernel.dtype
    assert_rule_agrees(out, name, kernel, grad)


def test_the_default_rule_is_corrected():
    kernel, grad = random_kernel(0, (3, 5, 4)), random_array(1, (3, 5, 4))
    assert_rule_agrees(pull_back(kernel, grad), "corrected", kernel, grad)


@pytest.mark.parametrize("out_dtype", ["kernel's", "float32"])
@each_half
def test_a_function_can_be_a_rule(dtype, out_dtype):
    def triple(kernel, grad):
        out = 3 * grad * (kernel > 0)
        return out if out_dtype == "kernel's" else out.astype(jnp.float32)

    kernel = random_kernel(0, (3, 5, 4), dtype)
    grad = random_array(1, kernel.shape, dtype)
    out = jax.jit(lambda w, g: pull_back(w, g, rule=triple))(kernel, grad)
    assert out.dtype == kernel.dtype
    assert_close(out, 3 * oracles.f64(grad) * (oracles.f64(kernel) > 0))


@pytest.mark.parametrize(
    "multiplier",
    [
        0.5,
        3,
        np.float32(-2),
        np.float64(1e9),
        np.int32(7),
        jnp.array(0.25),
        jnp.int32(5),
    ],
    ids=lambda value: type(value).__name__ + str(value),
)
def test_multipliers_of_any_type_scale_the_gradient(multiplier):
    kernel, grad = random_kernel(0, (3, 5, 4)), random_array(1, (3, 5, 4))
    out = pull_back(kernel, grad, multiplier=multiplier)
    assert_rule_agrees(out, "corrected", kernel, grad, float(multiplier))


def test_traced_multiplier_scales_and_has_zero_gradient():
    kernel, grad = random_kernel(0, (3, 5, 4)), random_array(1, (3, 5, 4))

    @jax.jit
    def pull(kernel, multiplier):
        view = lambda w, m: xnor.binarize(w, multiplier=m)  # noqa: E731
        return jax.vjp(view, kernel, multiplier)[1](grad)

    for multiplier in (2.0, -0.125):
        latent, multiplier_gradient = pull(kernel, multiplier)
        assert_rule_agrees(latent, "corrected", kernel, grad, multiplier)
        assert multiplier_gradient == 0


@each_half
@pytest.mark.parametrize("kind", ["python", "traced"])
def test_large_multiplier_does_not_overflow_half_precision(dtype, kind):
    # 1e6 is infinite in float16, yet the products are not; 0 · 1e6 is 0, not nan.
    kernel = random_kernel(0, (3, 5, 4), dtype)
    grad = (2.0**-12 * random_array(1, kernel.shape)).at[0].set(0.0).astype(dtype)
    pull = lambda m: pull_back(kernel, grad, rule="ste", multiplier=m)  # noqa: E731
    out = pull(1e6) if kind == "python" else jax.jit(pull)(1e6)
    assert out.dtype == kernel.dtype
    assert_rule_agrees(out, "ste", kernel, grad, 1e6)


def test_small_multiplier_prevents_float16_overflow():
    # n·g alone exceeds 65504; users pass 1/n to cancel n.
    kernel = random_kernel(0, (300, 2), "float16")
    grad = (500 * random_array(1, kernel.shape)).astype("float16")
    out = pull_back(kernel, grad, multiplier=1 / 300)
    assert_rule_agrees(out, "corrected", kernel, grad, 1 / 300)


@each_rule
@each_half
def test_kernel_and_gradient_may_differ_in_dtype(name, dtype):
    kernel, grad = random_kernel(0, (3, 5, 4), dtype), random_array(1, (3, 5, 4))
    out = rules.get(name)(kernel, grad)
    assert out.dtype == jnp.float32
    assert_rule_agrees(out, name, kernel, grad)
    out = rules.get(name)(kernel.astype(jnp.float32), grad.astype(dtype))
    assert out.dtype == dtype
    assert_rule_agrees(out, name, kernel, grad.astype(dtype))


@pytest.mark.parametrize("name", ["corrected", "paper"])
def test_centring_rules_refuse_one_input_channel(name):
    kernel = random_kernel(0, (3, 1, 4))
    with pytest.raises(ValueError, match="at least 2 input channels"):
        rules.get(name)(kernel, kernel)
    with pytest.raises(ValueError, match=r"^binarize: .* at \['conv'\]"):
        xnor.binarize({"conv": kernel}, rule=name)


@pytest.mark.parametrize("name", ["exact", "ste"])
def test_other_rules_accept_one_input_channel(name):
    kernel, grad = random_kernel(0, (3, 1, 4)), random_array(1, (3, 1, 4))
    out = pull_back(kernel, grad, rule=name)
    assert_rule_agrees(out, name, kernel, grad)


@pytest.mark.parametrize("multiplier", ["1e9", None])
def test_a_multiplier_that_is_no_number_is_named(multiplier):
    kernel = jnp.ones((3, 3, 4, 2))
    with pytest.raises(TypeError, match="multiplier: expected a number, got"):
        xnor.binarize({"kernel": kernel}, multiplier=multiplier)
    with pytest.raises(TypeError, match="multiplier: expected a number, got"):
        xnor.optim.apply_rule(multiplier=multiplier)


def test_a_gradient_is_floating():
    with pytest.raises(TypeError, match="a floating point gradient, got int32"):
        rules.ste(jnp.ones((3, 2)), jnp.ones((3, 2), jnp.int32))


def test_unknown_name_error_lists_the_rules():
    for call in (rules.get, lambda rule: xnor.binarize(jnp.ones((3, 2)), rule=rule)):
        with pytest.raises(ValueError, match="'corected'") as caught:
            call("corected")
        assert all(name in str(caught.value) for name in oracles.RULES)


@pytest.mark.parametrize("rule", [None, 3, ("ste",)])
def test_non_callable_rules_are_refused(rule):
    with pytest.raises(TypeError, match="expected a name or a"):
        xnor.binarize(jnp.ones((3, 2)), rule=rule)


@pytest.mark.parametrize(
    "rule",
    [lambda w, g: g.sum(), lambda w, g: g[:1], lambda w, g: (g,), lambda w, g: None],
    ids=["scalar", "slice", "tuple", "none"],
)
def test_rules_with_wrong_output_shape_are_refused(rule):
    with pytest.raises(ValueError, match=r"^binarize: .*\(3, 2\).* at \['conv'\]"):
        xnor.binarize({"conv": random_kernel(0, (3, 2))}, rule=rule)


@each_rule
def test_mismatched_kernel_and_gradient_shapes_are_refused(name):
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 1\)"):
        rules.get(name)(jnp.ones((3, 2)), jnp.ones((3, 1)))


@each_rule
def test_an_integer_kernel_is_refused(name):
    with pytest.raises(TypeError, match="floating point kernel, got int32"):
        rules.get(name)(jnp.ones((3, 2), jnp.int32), jnp.ones((3, 2)))


def test_rules_table_is_immutable():
    assert set(rules.RULES) == set(oracles.RULES)
    table: Any = rules.RULES
    with pytest.raises(TypeError):
        table["mine"] = rules.ste
