from functools import partial
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import trees
from absl.testing import parameterized
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracles import assert_close, random_array, random_kernel

import xnor_jax as xnor
from xnor_jax import optim

apply_updates: Any = optax.apply_updates  # annotated only as a tree
jit_and_eager: Any = chex.variants(with_jit=True, without_jit=True)
each_rule = pytest.mark.parametrize("rule", oracles.RULES)
each_dtype = pytest.mark.parametrize("dtype", oracles.DTYPES)
each_half = pytest.mark.parametrize("dtype", oracles.HALF)

MASK = {"binary": {"kernel": True, "bias": False}, "norm": {"scale": False}}
SCALES = {"binary": False, "norm": {"scale": True}}


def make_params(dtype="float32", magnitude=0.7) -> dict[str, Any]:
    kernel = random_kernel(0, (3, 5, 4), dtype, magnitude)
    bias = random_array(1, (4,), dtype)
    scale = jnp.array([0.02, 0.3, 0.9, 1.7], dtype)
    return {"binary": {"kernel": kernel, "bias": bias}, "norm": {"scale": scale}}


def make_grads(params, seed=7) -> Any:
    seeds = iter(range(seed, seed + 100))
    return jax.tree.map(lambda x: random_array(next(seeds), x.shape, x.dtype), params)


def apply(optimizer, params, grads) -> Any:
    @jax.jit
    def step(params, grads):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return apply_updates(params, updates)

    return step(params, grads)


# The inner optimizers of the test matrix, as in optax's common tests.
INNER = {
    "sgd": partial(optax.sgd, 0.05),
    "momentum": partial(optax.sgd, 0.05, momentum=0.9, nesterov=True),
    "adam": partial(optax.adam, 0.02),
    "adam with L2": lambda: optax.chain(
        optax.add_decayed_weights(1e-5), optax.adam(0.02)
    ),
    "adamw": partial(optax.adamw, 0.02, weight_decay=1e-4),
    "lion": partial(optax.lion, 0.003),
    "schedule": lambda: optax.adam(optax.exponential_decay(0.02, 10, 0.9)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.cosine_decay_schedule(0.02, 200)
    ),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(0.02, mu_dtype="float32")
    ),
}

WRAPPERS = {
    "bare": lambda optimizer: optimizer,
    "chain": lambda optimizer: optax.chain(
        optimizer, optim.count_sign_flips(MASK), optax.identity()
    ),
    "MultiSteps": lambda optimizer: optax.MultiSteps(optimizer, 2),
    "apply_if_finite": lambda optimizer: optax.apply_if_finite(optimizer, 3),
    "multi_transform": lambda optimizer: optax.partition(
        {True: optimizer, False: optax.adam(0.02)}, MASK
    ),
}

each_inner = pytest.mark.parametrize("inner", INNER)
MATRIX = [("bare", inner) for inner in INNER]
MATRIX += [(wrapper, "sgd") for wrapper in WRAPPERS if wrapper != "bare"]
matrix = pytest.mark.parametrize(("wrapper", "inner"), MATRIX)


def make_optimizer(wrapper, inner):
    return WRAPPERS[wrapper](optim.binop(INNER[inner](), MASK, rule="exact"))


@matrix
def test_training_reaches_a_binary_target(wrapper, inner):
    # A target that a centred kernel can reach: the binary view of one.
    target_params = make_params(magnitude=0.4)
    target = xnor.binarize(xnor.project(target_params, MASK), MASK)
    start = jax.tree.map(lambda x: random_array(11, x.shape) / 4, target_params)
    optimizer: Any = make_optimizer(wrapper, inner)

    def loss(view) -> Any:
        distance = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), view, target)
        return optax.tree.sum(distance)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(xnor.binarize(params, MASK))
        updates, state = optimizer.update(grads, state, params)
        return (apply_updates(params, updates), state), None

    params = xnor.project(start, MASK)
    carry = params, optimizer.init(params)
    # `scan` refuses a state whose structure, shapes or dtypes change.
    (trained, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=400))(carry)
    before = loss(xnor.binarize(params, MASK))
    assert loss(xnor.binarize(trained, MASK)) < 0.05 * before


@matrix
@each_dtype
def test_state_and_params_keep_structure_shapes_and_dtypes(wrapper, inner, dtype):
    params = make_params(dtype)
    optimizer: Any = make_optimizer(wrapper, inner)
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, make_grads(params), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    stored = jax.eval_shape(apply_updates, params, updates)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, stored)


@matrix
def test_second_call_does_not_recompile(wrapper, inner, compilations):
    params = make_params()
    optimizer: Any = make_optimizer(wrapper, inner)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state

    params, state = step(params, optimizer.init(params), make_grads(params))
    grads = make_grads(params, seed=8)
    before = compilations()
    step(params, state, grads)
    assert compilations() == before


@pytest.mark.parametrize("wrapper", ["bare", "chain", "apply_if_finite"])
def test_update_works_under_cond(wrapper):
    params = make_params()
    optimizer: Any = make_optimizer(wrapper, "adam")
    grads, state = make_grads(params), optimizer.init(params)

    @jax.jit
    def update_if(predicate):
        skip = jax.tree.map(jnp.zeros_like, params), state
        return jax.lax.cond(
            predicate, lambda: optimizer.update(grads, state, params), lambda: skip
        )

    expected = jax.jit(optimizer.update)(grads, state, params)
    chex.assert_trees_all_close(update_if(True), expected, rtol=1e-5, atol=1e-6)
    assert not np.any(update_if(False)[0]["binary"]["kernel"])


def rule_and_view_gradients(params):
    weight = make_grads(params)

    def loss(view):  # nonlinear: the gradient depends on the point
        terms = jax.tree.map(lambda x, w: (x * w + x**3).sum(), view, weight)
        return optax.tree.sum(terms)

    grads = jax.grad(loss)(xnor.binarize(params, MASK))
    for rule in oracles.RULES:
        transform = optim.apply_rule(rule, MASK, multiplier=2.5)
        applied, _ = transform.update(grads, transform.init(params), params)
        view = partial(xnor.binarize, mask=MASK, rule=rule, multiplier=2.5)
        yield applied, jax.grad(lambda params: loss(view(params)))(params)  # noqa: B023


def assert_gradient_pairs_match(pairs, params):
    for applied, differentiated in pairs:
        chex.assert_trees_all_equal_dtypes(applied, differentiated, params)
        eps = 2 * float(jnp.finfo(params["binary"]["kernel"].dtype).eps)
        size = float(jnp.abs(differentiated["binary"]["kernel"]).max())
        chex.assert_trees_all_close(applied, differentiated, rtol=eps, atol=eps * size)


@each_dtype
def test_apply_rule_matches_gradient_through_binarize(dtype):
    params = make_params(dtype)
    pairs = jax.jit(lambda params: list(rule_and_view_gradients(params)))(params)
    assert_gradient_pairs_match(pairs, params)


@each_rule
def test_apply_rule_matches_numpy_and_passes_other_leaves(rule):
    params = make_params()
    grads = make_grads(params)
    transform: Any = optim.apply_rule(rule, MASK, multiplier=-3.0)
    out, state = transform.update(grads, transform.init(params), params)
    assert state == transform.init(params)
    args = rule, params["binary"]["kernel"], grads["binary"]["kernel"]
    size = 3 * oracles.rule_size(*args)
    assert_close(out["binary"]["kernel"], -3 * oracles.rule(*args), size=size)
    assert out["binary"]["bias"] is grads["binary"]["bias"]
    assert out["norm"]["scale"] is grads["norm"]["scale"]


def test_apply_rule_accepts_a_function():
    params = make_params()
    grads = make_grads(params)
    transform: Any = optim.apply_rule(lambda kernel, grad: kernel + 2 * grad, MASK)
    out, _ = transform.update(grads, transform.init(params), params)
    kernel, grad = params["binary"]["kernel"], grads["binary"]["kernel"]
    np.testing.assert_allclose(out["binary"]["kernel"], kernel + 2 * grad, rtol=1e-6)


def test_apply_rule_avoids_float16_multiplier_overflow():
    params = {"kernel": random_kernel(0, (5, 4), "float16")}
    grads = {"kernel": (2.0**-12 * random_array(1, (5, 4))).astype("float16")}
    transform: Any = optim.apply_rule("ste", multiplier=1e6)
    out, _ = transform.update(grads, transform.init(params), params)
    assert_close(
        out["kernel"], 1e6 * oracles.rule("ste", params["kernel"], grads["kernel"])
    )


def project_step(params, updates, **options) -> Any:
    transform: Any = optim.project(MASK, **options)
    return transform.update(updates, transform.init(params), params)[0]


class ProjectTest(chex.TestCase):
    @jit_and_eager
    @parameterized.product(dtype=oracles.DTYPES, magnitude=[0.05, 0.7])
    def test_stored_kernel_is_the_projected_update(self, dtype, magnitude):
        @self.variant
        def step(params, updates):
            return apply_updates(params, project_step(params, updates))

        params = xnor.project(make_params(dtype), MASK)
        for seed in range(5):
            updates = make_grads(params, 10 * seed)
            stored = step(params, updates)
            chex.assert_trees_all_equal_dtypes(stored, params)
            kernel = stored["binary"]["kernel"]
            assert jnp.abs(kernel).max() == 1  # large updates: some are clamped
            updated = jax.tree.map(
                lambda a, b: oracles.f64(a) + oracles.f64(b), params, updates
            )
            # One rounding each: move, centre, subtract the old, add it again.
            tolerance = 4 * 4 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                oracles.f64(kernel),
                oracles.project(updated["binary"]["kernel"]),
                atol=tolerance,
            )
            bias = updated["binary"]["bias"]
            assert_close(stored["binary"]["bias"], bias, size=4.0)
            params = stored


def test_small_steps_keep_kernels_centred():
    params = xnor.project(make_params(magnitude=0.05), MASK)
    params["binary"]["kernel"] = params["binary"]["kernel"] / 4
    for seed in range(20):
        updates = jax.tree.map(lambda x: 0.02 * x, make_grads(params, 10 * seed))
        params = apply_updates(params, project_step(params, updates))
    kernel = oracles.f64(params["binary"]["kernel"])
    assert np.abs(kernel).max() < 1
    np.testing.assert_allclose(kernel.mean(axis=-2), 0, atol=1e-6)


@each_dtype
def test_kernels_never_exceed_one_after_rounding(dtype):
    # Updates of a large |kernel| are rounded coarsely: adding one may overshoot 1.
    kernel = random_kernel(0, (40, 50), dtype, magnitude=6.0)
    stored = apply(optim.project(), kernel, random_array(1, kernel.shape, dtype))
    assert np.abs(oracles.f64(stored)).max() <= 1


@each_half
def test_half_precision_updates_keep_kernel_precision(dtype):
    kernel = xnor.project(random_kernel(0, (20, 30)))
    updates = random_array(1, kernel.shape, dtype)
    stored = apply(optim.project(), kernel, updates)
    assert stored.dtype == kernel.dtype
    assert np.abs(oracles.f64(stored)).max() <= 1
    expected = oracles.project(oracles.f64(kernel) + oracles.f64(updates))
    np.testing.assert_allclose(stored, expected, atol=1e-5)


@each_dtype
def test_scale_mask_keeps_norm_scales_above_the_minimum(dtype):
    params = make_params(dtype)
    updates = make_grads(params)
    eps = float(jnp.finfo(dtype).eps)
    for options, minimum in (({}, 0.01), ({"scale_minimum": 0.25}, 0.25)):
        bounded = project_step(params, updates, scale_mask=SCALES, **options)
        stored = apply_updates(params, bounded)
        scale = oracles.f64(stored["norm"]["scale"])
        updated = oracles.f64(params["norm"]["scale"]) + oracles.f64(
            updates["norm"]["scale"]
        )
        assert updated.min() < minimum < updated.max()  # both cases occur
        np.testing.assert_allclose(scale, np.maximum(updated, minimum), atol=4 * eps)
        plain = project_step(params, updates)
        chex.assert_trees_all_equal(bounded["binary"], plain["binary"])
        assert plain["norm"]["scale"] is updates["norm"]["scale"]


@pytest.mark.parametrize("start", [1.0, 0.7, 5.3, -5.3])
def test_norm_scale_never_falls_below_the_minimum(start):
    params = {"scale": jnp.linspace(start, start + 0.1, 101)}
    transform: Any = optim.project(False, scale_mask=True)
    stored = apply(transform, params, {"scale": jnp.full(101, -20.0)})["scale"]
    # To the rounding of a sum with the old scale.
    ulp = float(jnp.finfo(jnp.float32).eps) * abs(start + 0.1)
    assert stored.min() >= 0.01 - ulp


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_three_steps_of_adam_agree_with_numpy(decay):
    rate, wd, b1, b2, eps = 0.01, 0.1, 0.9, 0.999, 1e-8
    if decay == "coupled":  # as in PyTorch and the published recipe
        inner = optax.chain(optax.add_decayed_weights(wd), optax.adam(rate))
    else:
        inner = optax.adamw(rate, weight_decay=wd)
    optimizer: Any = optim.binop(inner, MASK, multiplier=0.5)
    params = xnor.project(make_params(), MASK)
    state = optimizer.init(params)
    w = oracles.f64(params["binary"]["kernel"])
    m, v = np.zeros_like(w), np.zeros_like(w)
    step = jax.jit(optimizer.update)
    for t in range(1, 4):
        grads = make_grads(params, seed=10 * t)
        updates, state = step(grads, state, params)
        params = apply_updates(params, updates)

        g = 0.5 * oracles.rule("corrected", w, oracles.f64(grads["binary"]["kernel"]))
        g += wd * w if decay == "coupled" else 0
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        direction += wd * w if decay == "decoupled" else 0
        w = oracles.project(w - rate * direction)
    np.testing.assert_allclose(params["binary"]["kernel"], w, atol=2e-6)


def test_binop_equals_the_chain_of_its_parts():
    params, inner = make_params(), optax.adam(0.1)
    binop = optim.binop(inner, MASK, "paper", 3.0)
    rule = optim.apply_rule("paper", MASK, 3.0)
    chain = optax.chain(rule, inner, optim.project(MASK))
    state = binop.init(params)
    chex.assert_trees_all_equal(state, chain.init(params))
    grads = make_grads(params)
    chex.assert_trees_all_equal(
        *(
            jax.jit(optimizer.update)(grads, state, params)
            for optimizer in (binop, chain)
        )
    )


def test_adam_depends_on_multiplier_only_with_coupled_decay():
    params = xnor.project(make_params(), MASK)
    grads = make_grads(params)

    def kernel(inner, multiplier):
        stored = apply(optim.binop(inner, MASK, multiplier=multiplier), params, grads)
        return stored["binary"]["kernel"]

    decoupled = optax.adamw(0.01, eps=0.0, weight_decay=0.1)
    small, large = kernel(decoupled, 1.0), kernel(decoupled, 1024.0)
    np.testing.assert_allclose(small, large, atol=1e-6)
    coupled = optax.chain(optax.add_decayed_weights(10.0), optax.adam(0.01, eps=0.0))
    small, large = kernel(coupled, 1.0), kernel(coupled, 1024.0)
    assert np.abs(small - large).max() > 1e-3


def test_a_mask_may_be_a_callable_or_a_prefix():
    params = make_params()
    grads = make_grads(params)
    expected = apply(optim.binop(optax.sgd(0.1), MASK), params, grads)
    for mask in (lambda params: MASK, {**MASK, "norm": False}):
        stored = apply(optim.binop(optax.sgd(0.1), mask), params, grads)
        chex.assert_trees_all_equal(stored, expected)


@pytest.mark.parametrize("kind", ["array", "dict", "nnx", "linen"])
def test_binop_works_on_every_kind_of_tree(kind):
    params, mask = trees.make(kind)
    optimizer = optim.binop(optax.sgd(0.1), mask)
    stored = apply(optimizer, params, make_grads(params))
    assert jax.tree.structure(stored) == jax.tree.structure(params)
    grads = jax.tree.leaves(make_grads(params))
    leaves = map(jax.tree.leaves, (mask, params, stored))
    for grad, binary, before, after in zip(grads, *leaves, strict=True):
        w, g = oracles.f64(before), oracles.f64(grad)
        if binary:
            expected = oracles.project(w - 0.1 * oracles.rule("corrected", w, g))
        else:
            expected = w - 0.1 * g
        np.testing.assert_allclose(after, expected, atol=1e-5)


def test_stacked_layers_update_like_single_layers():
    # The bias reveals that the kernel is a stack, as `nnx.scan` runs.
    params = {"kernel": random_kernel(0, (3, 4, 5)), "bias": random_array(1, (3, 5))}
    grads = {"kernel": random_array(2, (3, 4, 5)), "bias": random_array(3, (3, 5))}
    optimizer = optim.binop(optax.sgd(0.1), {"kernel": True, "bias": False})
    stacked = apply(optimizer, params, grads)
    for i in range(3):
        layer, grad = (jax.tree.map(lambda x, i=i: x[i], t) for t in (params, grads))
        single = apply(optimizer, layer, grad)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], stacked), single, atol=1e-6
        )


def test_binop_works_on_an_equinox_module():
    model, mask = trees.make("equinox")
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = optim.binop(optax.sgd(0.1), mask)  # the mask of the whole model
    stored = eqx.combine(apply(optimizer, params, make_grads(params)), static)
    assert stored.binary.activation is model.binary.activation
    kernel = stored.binary.kernel
    assert jnp.abs(kernel).max() <= 1 and not jnp.array_equal(
        kernel, model.binary.kernel
    )


def test_binop_works_in_nnx_optimizer():
    # `nnx.Optimizer` passes a state without the `nnx.Param` boxes of the mask.
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 5, rngs=rngs)
            self.middle = nnx.Linear(5, 4, rngs=rngs)
            self.last = nnx.Linear(4, 2, rngs=rngs)

    model = Net(nnx.Rngs(0))
    optimizer = optim.binop(optax.sgd(0.1), xnor.inner_kernels(model))
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    grads = make_grads(nnx.state(model, nnx.Param))
    w, g = (oracles.f64(x.middle.kernel[...]) for x in (model, grads))
    real = model.last.kernel[...] - 0.1 * grads.last.kernel[...]
    optimizer.update(model, grads)
    expected = oracles.project(w - 0.1 * oracles.rule("corrected", w, g))
    np.testing.assert_allclose(model.middle.kernel[...], expected, atol=1e-5)
    np.testing.assert_allclose(model.last.kernel[...], real, rtol=1e-6)


def test_injected_multiplier_changes_without_recompiling(
    compilations,
):
    params = make_params()
    grads = make_grads(params)
    factory = optax.inject_hyperparams(optim.apply_rule, static_args=("rule", "mask"))
    args = "corrected", params["binary"]["kernel"], grads["binary"]["kernel"]
    expected, size = oracles.rule(*args), oracles.rule_size(*args)

    settable: Any = factory(rule="corrected", mask=MASK, multiplier=2.0)
    update = jax.jit(settable.update)
    state = settable.init(params)
    for multiplier in (2.0, 0.25):
        state.hyperparams["multiplier"] = jnp.float32(multiplier)
        before = compilations()
        out, state = update(grads, state, params)
        assert_close(out["binary"]["kernel"], multiplier * expected, size=2 * size)
    assert compilations() == before

    scheduled: Any = factory(mask=MASK, multiplier=lambda count: 1.0 + count)
    update = jax.jit(scheduled.update)
    state = scheduled.init(params)
    for multiplier in (1.0, 2.0, 3.0):
        out, state = update(grads, state, params)
        assert_close(out["binary"]["kernel"], multiplier * expected, size=3 * size)


def test_hyperparameters_of_binop_and_project_can_be_injected():
    params = make_params()
    grads = make_grads(params)
    inner = optax.sgd(0.1)
    injected = optax.inject_hyperparams(optim.binop)(inner, MASK, multiplier=0.5)
    expected = apply(optim.binop(inner, MASK, multiplier=0.5), params, grads)
    chex.assert_trees_all_close(apply(injected, params, grads), expected, atol=1e-6)
    injected = optax.inject_hyperparams(optim.project)(
        MASK, scale_mask=SCALES, scale_minimum=0.2
    )
    expected = apply(
        optim.project(MASK, scale_mask=SCALES, scale_minimum=0.2), params, grads
    )
    chex.assert_trees_all_close(apply(injected, params, grads), expected, atol=1e-6)


def test_binop_supports_learning_rate_schedules():
    rates = [0.1, 0.0, 0.3]
    schedule = lambda count: jnp.array(rates)[count]  # noqa: E731
    optimizer: Any = optim.binop(optax.sgd(schedule), MASK)
    params = make_params()
    grads, state = make_grads(params), optimizer.init(params)
    update = jax.jit(optimizer.update)
    for rate in rates:
        updates, state = update(grads, state, params)
        np.testing.assert_allclose(
            updates["binary"]["bias"], -rate * grads["binary"]["bias"], rtol=1e-6
        )
        expected = apply(optim.binop(optax.sgd(rate), MASK), params, grads)
        params = apply_updates(params, updates)
        chex.assert_trees_all_close(params, expected, atol=1e-6)


def test_multi_steps_applies_the_mean_gradient():
    params = make_params()
    first, second = make_grads(params), make_grads(params, seed=8)
    binop = optim.binop(optax.sgd(0.1), MASK)
    optimizer = optax.MultiSteps(binop, every_k_schedule=2)
    update = jax.jit(optimizer.update)
    updates, state = update(first, optimizer.init(params), params)
    unchanged = apply_updates(params, updates)
    chex.assert_trees_all_equal(unchanged, params)
    updates, state = update(second, state, unchanged)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    chex.assert_trees_all_close(
        apply_updates(unchanged, updates), apply(binop, params, mean), atol=1e-5
    )


def test_apply_if_finite_skips_nan_updates():
    params = make_params()
    grads = make_grads(params)
    nan_grads = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads)
    binop = optim.binop(optax.adam(0.1), MASK)
    optimizer = optax.apply_if_finite(binop, max_consecutive_errors=3)
    update = jax.jit(optimizer.update)
    updates, state = update(nan_grads, optimizer.init(params), params)
    chex.assert_trees_all_equal(apply_updates(params, updates), params)
    updates, state = update(grads, state, params)
    stored = apply_updates(params, updates)
    chex.assert_trees_all_close(stored, apply(binop, params, grads), atol=1e-6)


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "the whole tree's"])
def test_partition_gives_each_part_its_own_optimizer(mask):
    params = make_params()
    grads = make_grads(params)
    binary = optim.binop(optax.sgd(0.1), mask)
    optimizer = optax.partition({True: binary, False: optax.sgd(3.0)}, MASK)
    stored = apply(optimizer, params, grads)
    expected = apply(optim.binop(optax.sgd(0.1), MASK), params, grads)
    chex.assert_trees_all_close(
        stored["binary"]["kernel"], expected["binary"]["kernel"]
    )
    expected = params["binary"]["bias"] - 3 * grads["binary"]["bias"]
    np.testing.assert_allclose(stored["binary"]["bias"], expected, rtol=1e-6)


def test_optax_masked_matches_the_mask_argument():
    params = make_params()
    grads = make_grads(params)
    masked: Any = optax.masked(optim.binop(optax.sgd(1.0)), MASK)
    updates, _ = masked.update(grads, masked.init(params), params)
    stored = apply_updates(params, updates)
    expected = apply(optim.binop(optax.sgd(1.0), MASK), params, grads)
    chex.assert_trees_all_close(
        stored["binary"]["kernel"], expected["binary"]["kernel"]
    )
    assert updates["norm"]["scale"] is grads["norm"]["scale"]


def test_buffer_donation_does_not_change_results():
    optimizer: Any = make_optimizer("chain", "adam")

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state

    outcomes = []
    for donated in ((), (0, 1)):
        run = jax.jit(step, donate_argnums=donated)
        params = make_params()
        state = optimizer.init(params)
        for seed in (1, 2, 3):
            params, state = run(params, state, make_grads(params, seed))
        outcomes.append((params, state))
    chex.assert_trees_all_equal(*outcomes)


def test_sharded_params_stay_sharded_with_equal_results():
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("device",))
    sharding = NamedSharding(mesh, P(None, "device"))
    kernel = xnor.project(random_kernel(0, (5, 3 * len(devices))))
    grad = random_array(1, kernel.shape)
    optimizer = optim.binop(optax.adam(0.1))
    expected = apply(optimizer, kernel, grad)
    stored = apply(optimizer, *jax.device_put((kernel, grad), sharding))
    np.testing.assert_allclose(stored, expected, atol=1e-5)
    assert stored.sharding.is_equivalent_to(sharding, 2)


@each_dtype
def test_sign_flips_are_counted_and_updates_unchanged(dtype):
    params = make_params(dtype)
    transform: Any = optim.count_sign_flips(MASK)
    state = transform.init(params)
    assert state.flip_ratio["binary"]["kernel"] == 0
    update = jax.jit(transform.update)
    for seed in range(4):
        updates = jax.tree.map(
            lambda x: (x / 2).astype(dtype), make_grads(params, seed)
        )
        same, _ = transform.update(updates, state, params)
        assert same is updates
        _, state = update(updates, state, params)
        stored = apply_updates(params, updates)
        before, after = (oracles.sign(p["binary"]["kernel"]) for p in (params, stored))
        flips, n = np.sum(before != after), before.size
        assert 0 < flips < n
        ratio = state.flip_ratio["binary"]["kernel"]
        assert ratio.dtype == jnp.float32 and ratio.shape == ()
        np.testing.assert_allclose(ratio * n, flips, rtol=1e-6)
        params = stored


def test_leaving_zero_counts_as_a_flip_only_downwards():
    kernel = jnp.array([[0.0, -0.0, 0.0, 0.5], [-0.5, -0.5, 0.5, 0.5]])
    step = jnp.array([[-0.1, -0.1, 0.1, -0.5], [0.5, 0.4, -0.6, 0.0]])
    transform: Any = optim.count_sign_flips()
    _, state = transform.update(step, transform.init(kernel), kernel)
    # Down from ±0 twice, up to 0 once, through 0 once; 0.5 to 0 is no flip.
    assert state.flip_ratio == 4 / 8


def test_sign_flips_of_an_update_of_another_shape_are_refused():
    kernel, transform = jnp.ones((2, 2)), optim.count_sign_flips()
    with pytest.raises(ValueError, match=r"count_sign_flips: .*\(2, 2\), got \(1, 2\)"):
        transform.update(jnp.ones((1, 2)), transform.init(kernel), kernel)


def test_flip_ratio_covers_only_masked_kernels():
    params = make_params()
    optimizer: Any = make_optimizer("chain", "adam")
    ratio: Any = optax.tree.get(optimizer.init(params), "flip_ratio")
    assert len(jax.tree.leaves(ratio)) == 1
    assert ratio["binary"]["kernel"] == 0
    unmasked = optim.count_sign_flips().init(params)
    assert len(jax.tree.leaves(unmasked)) == 3


def test_flip_ratio_of_an_nnx_state():
    params, mask = trees.make("nnx")
    transform: Any = optim.count_sign_flips(mask)
    state = transform.init(params)
    updates = jax.tree.map(lambda x: -2 * x, params)
    _, after = jax.jit(transform.update)(updates, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    (ratio,) = jax.tree.leaves(after)
    kernel = oracles.f64(params["binary"][0]["kernel"][...])
    # Zeros keep their sign; all other weights flip.
    np.testing.assert_allclose(ratio, np.mean(kernel != 0), rtol=1e-6)


TRANSFORMS = {
    "apply_rule": optim.apply_rule,
    "project": optim.project,
    "count_sign_flips": optim.count_sign_flips,
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)


@each_transform
def test_missing_params_are_refused_with_the_call_signature(name):
    grads = {"conv": {"kernel": random_kernel(0, (3, 2))}}
    transform: Any = TRANSFORMS[name]()
    state = transform.init(grads)
    with pytest.raises(
        ValueError, match=rf"^{name}: .*\(updates, state, params\)"
    ) as e:
        transform.update(grads, state)
    assert "['conv']['kernel']" in str(e.value)


@pytest.mark.parametrize("name", ["apply_rule", "project"])
@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (jnp.ones((3, 1, 2)), ValueError, "at least 2 input channels"),
        (jnp.ones((3, 2), jnp.int32), TypeError, "got int32"),
        (jnp.ones(3), ValueError, r"got shape \(3,\)"),
    ],
)
def test_invalid_kernels_are_refused_by_name_and_path(name, leaf, error, message):
    params = {"conv": {"kernel": leaf}}
    transform: Any = TRANSFORMS[name]()
    with pytest.raises(error, match=f"^{name}: .*{message}") as caught:
        transform.update(params, transform.init(params), params)
    assert "['conv']['kernel']" in str(caught.value)


@each_transform
def test_mismatched_masks_are_refused_by_path(name):
    params = {"conv": {"kernel": random_kernel(0, (3, 2))}}
    transform: Any = TRANSFORMS[name](mask={"conv": {"kernle": True}})
    with pytest.raises(ValueError, match=f"^{name}: the mask") as caught:
        transform.update(params, transform.init(params), params)
    assert "['conv']['kernle']" in str(caught.value)


@each_transform
def test_a_traced_mask_is_refused(name):
    params = {"kernel": random_kernel(0, (3, 2))}

    def run(mask):
        transform = TRANSFORMS[name](mask=mask)
        return transform.update(params, transform.init(params), params)

    with pytest.raises(TypeError, match=f"^{name}: the mask must be static"):
        jax.jit(run)({"kernel": True})


def test_unknown_rules_are_refused_at_construction():
    for make in (optim.apply_rule, lambda rule: optim.binop(optax.sgd(1), rule=rule)):
        with pytest.raises(ValueError, match="unknown name 'xnor'"):
            make("xnor")


def test_rules_with_wrong_output_shape_are_refused_by_path():
    params = {"conv": {"kernel": random_kernel(0, (3, 2))}}
    transform: Any = optim.apply_rule(lambda w, g: g.sum())
    with pytest.raises(
        ValueError, match=r"^apply_rule: .*\(3, 2\), got \(\)"
    ) as caught:
        transform.update(params, (), params)
    assert "['conv']['kernel']" in str(caught.value)
