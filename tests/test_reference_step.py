"""The library's training step against the reference's in NumPy."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_loop as loop
from flax import nnx

import xnor_jax as xnor

# Compiling with optimizations takes longer than ten small steps.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LEARNING_RATE, DECAY = 1e-2, 1e-5
SHAPES = {
    "conv1.kernel": (3, 3, 2, 4),
    "conv1.bias": (4,),
    "norm2.scale": (4,),
    "norm2.bias": (4,),
    "conv2.kernel": (3, 3, 4, 6),
    "conv2.bias": (6,),
    "norm3.scale": (6,),
    "norm3.bias": (6,),
    "dense3.kernel": (4 * 3 * 6, 8),
    "dense3.bias": (8,),
    "dense4.kernel": (8, 3),
    "dense4.bias": (3,),
}
IMAGES = (13, 6, 5, 2)


class PlainNetwork(nnx.Module):
    """`loop.ReferenceNetwork` in Flax, with float layers.

    It uses nothing of this library but the sign of activations.
    """

    def __init__(self, rngs: nnx.Rngs):
        norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-4, rngs=rngs)
        self.conv1 = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm1 = norm(4, use_bias=False, use_scale=False)
        self.norm2 = norm(4)
        self.conv2 = nnx.Conv(4, 6, (3, 3), padding=1, rngs=rngs)
        self.norm3 = norm(6)
        self.dense3 = nnx.Linear(4 * 3 * 6, 8, rngs=rngs)
        self.dense4 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.conv2(xnor.sign_ste(self.norm2(x))))
        x = self.norm3(x).reshape(x.shape[0], -1)
        x = nnx.relu(self.dense3(xnor.sign_ste(x)))
        return self.dense4(x)


class BlockNetwork(nnx.Module):
    """The same network, built from the library's blocks."""

    def __init__(self, rngs: nnx.Rngs, rule: Any):
        self.conv1 = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.norm1 = nnx.BatchNorm(
            4, momentum=0.9, epsilon=1e-4, use_bias=False, use_scale=False, rngs=rngs
        )
        self.block2 = xnor.nn.XnorBlock(4, 6, (3, 3), padding=1, rule=rule, rngs=rngs)
        self.block3 = xnor.nn.XnorBlock(
            4 * 3 * 6, 8, norm_features=6, rule=rule, rngs=rngs
        )
        self.dense4 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm1(self.conv1(x)))
        return self.dense4(self.block3(self.block2(x)))


BLOCK_NAMES = {
    "norm2": "block2.norm",
    "conv2": "block2.layer",
    "norm3": "block3.norm",
    "dense3": "block3.layer",
}


def draw_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    # Wide enough that some weights are clamped; not centred.
    params = {name: 0.8 * rng.normal(size=s) + 0.1 for name, s in SHAPES.items()}
    # Small enough that the minimum applies.
    params["norm3.scale"] = np.array([0.05, 0.02, 0.011, 0.9, -0.4, 1.3])
    return params


def draw_batches(steps: int):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        yield rng.normal(size=IMAGES), rng.integers(0, 3, size=IMAGES[0])


def to_state(template: Any, params: dict[str, np.ndarray]) -> Any:
    """The parameters as the NNX state of a network; block names are translated."""

    def pick(path, leaf):
        name = xnor.masks.path_string(path).replace("/", ".")
        for plain, block in BLOCK_NAMES.items():
            name = name.replace(block, plain)
        assert params[name].shape == leaf.shape
        return jnp.asarray(params[name])

    return jax.tree.map_with_path(pick, template)


def to_dict(state: Any) -> dict[str, np.ndarray]:
    names = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        name = xnor.masks.path_string(path).replace("/", ".")
        for plain, block in BLOCK_NAMES.items():
            name = name.replace(block, plain)
        names[name] = np.asarray(leaf)
    return names


def split(network: Any, params: dict[str, np.ndarray]):
    """Graph, parameters and statistics in float64, and the inner kernels' mask."""
    model = nnx.eval_shape(lambda: network(nnx.Rngs(0)))
    graph, template, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    initial = jax.tree.map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, "var" in str(path), jnp.float64),
        statistics,
    )
    return graph, to_state(template, params), initial, xnor.inner_kernels(model)


def cross_entropy(graph, statistics, params, x, labels):
    model = nnx.merge(graph, params, statistics, copy=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()
    return loss, nnx.state(model, nnx.BatchStat)


def adam_with_decay() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(DECAY), optax.adam(LEARNING_RATE))


def bounded_scales(params) -> Any:
    return xnor.mask_by_path(params, lambda path, _: path.endswith("/scale"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def plain_step(params):
    """Gradients at the binary view, then `binop` over the published recipe's Adam."""
    graph, params, statistics, mask = split(PlainNetwork, params)
    optimizer = optax.chain(
        xnor.optim.binop(adam_with_decay(), mask),
        xnor.optim.project(False, scale_mask=bounded_scales(params)),
    )
    return graph, params, statistics, optimizer, partial(xnor.binarize, mask=mask)


def block_step(params):
    """The layers apply the rule; the optimizer's chain only projects."""
    network = partial(BlockNetwork, rule="corrected")
    graph, params, statistics, mask = split(network, params)
    scales = bounded_scales(params)
    optimizer = optax.chain(
        adam_with_decay(), xnor.optim.project(mask, scale_mask=scales)
    )
    return graph, params, statistics, optimizer, lambda params: params


@pytest.mark.parametrize(
    "make_step", [plain_step, pytest.param(block_step, marks=pytest.mark.slow)]
)
def test_ten_steps_match_the_reference(make_step, x64):
    reference = loop.ReferenceNetwork(draw_params(), loop.Adam(LEARNING_RATE, DECAY))
    # The reference centres and clamps before each step, the library after it.
    start = reference.prepare()
    assert (np.abs(start["conv2.kernel"]) == 1).any(), "the clamp did not bite"
    graph, params, statistics, optimizer, view = make_step(start)

    @quick_jit
    def step(params, statistics, state, x, labels):
        loss = jax.value_and_grad(cross_entropy, argnums=2, has_aux=True)
        (loss, statistics), grads = loss(graph, statistics, view(params), x, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), statistics, state, loss

    state = quick_jit(optimizer.init)(params)
    exceeded = []
    for x, labels in draw_batches(10):
        params, statistics, state, loss = step(params, statistics, state, x, labels)
        expected_loss = reference.step(x, labels)

        np.testing.assert_allclose(loss, expected_loss, rtol=1e-9)
        expected, ours = reference.prepare(), to_dict(params)
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(ours[name], value, 1e-9, 1e-9, err_msg=name)
        means = {n: v for n, v in to_dict(statistics).items() if n.endswith("mean")}
        assert len(means) == len(reference.means)
        for name, value in reference.means.items():
            np.testing.assert_allclose(means[f"{name}.mean"], value, 1e-9, 1e-9)
        exceeded.append(np.abs(reference.params["conv2.kernel"]).max() > 1)

    assert step._cache_size() == 1, "a second step was compiled"
    assert any(exceeded), "Adam moved no weight beyond the clamp"
    changes = {n: np.abs(reference.params[n] - v).max() for n, v in start.items()}
    # BatchNorm cancels the first bias, so the loss has no gradient for it.
    assert all(distance > 0.01 for n, distance in changes.items() if n != "conv1.bias")
    assert to_dict(params)["norm3.scale"].min() == pytest.approx(0.01, abs=1e-12)


def test_reference_gradients_match_finite_differences():
    """Check the reference loops by finite differences; the library is not involved."""
    rng = np.random.default_rng(2)

    def assert_slope(function, point, gradient):
        direction = rng.normal(size=point.shape)
        ahead, behind = (function(point + d * direction) for d in (1e-6, -1e-6))
        slope = (ahead - behind) / 2e-6
        np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-5)

    geometry = (2, 1), ((0, 2), (1, 0)), (1, 2), 2
    x, kernel = rng.normal(size=(3, 5, 6, 4)), rng.normal(size=(3, 2, 2, 6))
    g = rng.normal(size=loop.conv(x, kernel, *geometry).shape)
    d_x, d_kernel = loop.conv_gradients(x, kernel, g, *geometry)
    assert_slope(lambda x: np.vdot(loop.conv(x, kernel, *geometry), g), x, d_x)
    assert_slope(lambda w: np.vdot(loop.conv(x, w, *geometry), g), kernel, d_kernel)

    gamma, beta, g = rng.normal(size=4), rng.normal(size=4), rng.normal(size=x.shape)
    norm = lambda x, *v: np.vdot(  # noqa: E731
        loop.batch_norm(x, x.mean((0, 1, 2)), x.var((0, 1, 2)), 0.1, *v), g
    )
    d_x, d_gamma, d_beta = loop.batch_norm_gradients(x, 0.1, gamma, g)
    assert_slope(lambda x: norm(x, gamma, beta), x, d_x)
    assert_slope(lambda gamma: norm(x, gamma, beta), gamma, d_gamma)
    assert_slope(lambda beta: norm(x, gamma, beta), beta, d_beta)

    # After the last sign the loss is differentiable.
    params = draw_params()
    network = loop.ReferenceNetwork(params, loop.Adam(LEARNING_RATE, DECAY))
    images, labels = next(draw_batches(1))
    _, grads = network.loss_and_gradients(params, images, labels)
    for name in ("dense3.kernel", "dense3.bias", "dense4.kernel", "dense4.bias"):

        def loss(value, name=name):
            changed = {**params, name: value}
            return network.loss_and_gradients(changed, images, labels)[0]

        assert_slope(loss, params[name], grads[name])


RULES: dict[str, Any] = {
    "paper": "paper",
    "of the user": lambda kernel, grad: grad * (2 + jnp.cos(5 * kernel)),
}


@pytest.mark.parametrize("rule", RULES)
def test_binary_layers_match_a_binarized_plain_network(rule: str, x64):
    rule_option = RULES[rule]
    network = loop.ReferenceNetwork(draw_params(), loop.Adam(LEARNING_RATE, DECAY))
    start = network.prepare()
    plain_graph, plain, statistics, mask = split(PlainNetwork, start)
    block_graph, blocks, block_statistics, _ = split(
        partial(BlockNetwork, rule=rule_option), start
    )
    x, labels = next(draw_batches(1))

    def loss_of_view(params):
        view = xnor.binarize(params, mask, rule=rule_option)
        return cross_entropy(plain_graph, statistics, view, x, labels)

    def loss_of_layers(params):
        return cross_entropy(block_graph, block_statistics, params, x, labels)

    def run(loss, params):
        (loss, _), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
        return loss, to_dict(grads)

    by_view, by_layers = run(loss_of_view, plain), run(loss_of_layers, blocks)

    chex.assert_trees_all_close(by_view, by_layers, rtol=1e-9, atol=1e-12)
    if rule in loop.RULES:
        binarized = {name: loop.binarize(start[name]) for name in network.BINARY}
        loss, grads = network.loss_and_gradients({**start, **binarized}, x, labels)
        for name in network.BINARY:
            grads[name] = loop.RULES[rule](start[name], grads[name])
        chex.assert_trees_all_close(by_layers, (loss, grads), rtol=1e-9, atol=1e-12)
