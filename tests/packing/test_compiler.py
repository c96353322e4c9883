"""NNX, Linen, Equinox and plain networks: pack, save, load without the model, run."""

from functools import partial

import c_engine
import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import packed_networks
import pytest
from flax import linen, nnx
from hypothesis import strategies as st
from jax import lax
from oracles import assert_full_precision

import xnor_jax as xnor
from xnor_jax import ops
from xnor_jax.packing import compiler, graph

CONV = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def perturbed(tree, seed=1):
    """Perturb vectors and scalars as training would: none stays 0 or 1."""
    leaves, structure = jax.tree.flatten(tree)
    out = []
    for key, leaf in zip(keys(len(leaves), seed), leaves, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim < 2:
            noise = jax.random.normal(key, leaf.shape)
            leaf = jnp.where(leaf == 1, jnp.exp(0.3 * noise), leaf + 0.2 * noise)
        out.append(leaf)
    return jax.tree.unflatten(structure, out)


class Block(nnx.Module):
    """A ReActNet block, optionally with squeeze and excite."""

    def __init__(self, c_in, c_out, strides, excite, rngs):
        self.strides, self.grows, self.excite = strides, c_in != c_out, excite
        self.shift = nnx.Param(jnp.zeros(c_in))
        self.conv = xnor.nn.BinaryConv(
            c_in, c_out, (3, 3), strides, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(c_out, rngs=rngs)
        self.gamma, self.zeta = (nnx.Param(jnp.zeros(c_out)) for _ in range(2))
        self.slope = nnx.Param(jnp.full(c_out, 0.25))
        if excite:
            self.squeeze = nnx.Linear(c_in, 4, rngs=rngs)
            self.widen = nnx.Linear(4, c_out, rngs=rngs)

    def __call__(self, x):
        y = self.norm(self.conv(x + self.shift[...]))
        if self.excite:
            z = nnx.relu(self.squeeze(x.mean((1, 2))))
            y = y * nnx.sigmoid(self.widen(z))[:, None, None, :]
        shortcut = nnx.avg_pool(x, (2, 2), (2, 2)) if self.strides == 2 else x
        if self.grows:
            shortcut = jnp.concatenate([shortcut, shortcut], -1)
        y = y + shortcut - self.gamma[...]
        return jnp.where(y > 0, y, self.slope[...] * y) + self.zeta[...]


class Residual(nnx.Module):
    def __init__(self, rngs, excite=False):
        self.stem = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        sizes = ((16, 16, 1), (16, 32, 2))
        self.blocks = nnx.List([Block(*size, excite, rngs) for size in sizes])
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class GivenSigns(nnx.Module):
    """Layers with `surrogate=None` after a shifted sign, a sign and a pool of signs."""

    def __init__(self, rngs):
        conv = partial(xnor.nn.BinaryConv, surrogate=None, rngs=rngs)
        self.stem, self.norm = (
            nnx.Conv(2, 16, (3, 3), rngs=rngs),
            nnx.BatchNorm(16, rngs=rngs),
        )
        self.shift, self.conv2 = xnor.nn.RSign(16, rngs=rngs), conv(16, 24, (3, 3))
        self.act, self.conv3 = xnor.nn.RPReLU(24, rngs=rngs), conv(24, 20, (2, 2))
        self.dense = xnor.nn.BinaryLinear(20, 12, surrogate=None, rngs=rngs)
        self.head = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        signs = self.shift(self.norm(self.stem(x)))
        x = xnor.sign_ste(self.act(self.conv2(signs)))
        x = self.conv3(nnx.max_pool(x, (2, 2), (2, 2)))
        return self.head(self.dense(xnor.sign(xnor.sign(x))).max((1, 2)))


class Dense(nnx.Module):
    """A BinaryDenseNet: each block's input and output are concatenated."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 20, (3, 3), rngs=rngs)
        self.blocks = nnx.List(
            [
                xnor.nn.XnorBlock(c, 12, (3, 3), padding=1, relu=False, rngs=rngs)
                for c in (20, 32)
            ]
        )
        self.norm = nnx.BatchNorm(44, rngs=rngs)
        self.head = nnx.Linear(44, 4, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = jnp.concatenate([x, block(x)], axis=-1)
        x = nnx.max_pool(nnx.relu(self.norm(x)), (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


class Grouped(nnx.Module):
    """Depthwise and grouped convolutions with a channel shuffle."""

    def __init__(self, rngs):
        conv = partial(xnor.nn.BinaryConv, rule="ste", rngs=rngs)
        self.stem = nnx.Conv(2, 24, (3, 3), rngs=rngs)
        self.depthwise = conv(24, 24, (3, 3), feature_group_count=24)
        self.grouped = conv(24, 36, (2, 3), padding="VALID", feature_group_count=3)
        self.norm = nnx.BatchNorm(36, rngs=rngs)
        self.last = conv(36, 8, (1, 1))

    def __call__(self, x):
        x = self.depthwise(self.stem(x)) + 0.01
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, 4, c // 4).swapaxes(3, 4).reshape(n, h, w, c)
        return self.last(self.norm(self.grouped(x))).mean((1, 2))


class Attention(nnx.Module):
    """Attention with binary projections; products of two activations stay real."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(6, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        linear = partial(xnor.nn.BinaryLinear, 32, rngs=rngs)
        self.query, self.key, self.value, self.out = (linear(32) for _ in range(4))
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        y = self.norm(x)
        q, k, v = (
            layer(y).reshape(*y.shape[:-1], 4, 8)
            for layer in (self.query, self.key, self.value)
        )
        weights = nnx.softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k) / 8)
        y = jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(x.shape)
        return self.head((x + self.out(y)).mean(1))


class Own(nnx.Module):
    """A custom `__call__` with Python control flow, dropout and a list of layers."""

    def __init__(self, rngs):
        self.first = nnx.Linear(9, 40, rngs=rngs)
        self.layers = nnx.List(
            [xnor.nn.XnorBlock(40, 40, dropout=0.3, rngs=rngs) for _ in range(3)]
        )
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(40, 3, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for index, layer in enumerate(self.layers):
            y = layer(x)
            x = x + y if index % 2 else self.dropout(y)
        return nnx.log_softmax(self.last(x))


class Linen(linen.Module):
    """A Linen model with `binarize` and `sign_ste`; its pools are `reduce_window`."""

    @linen.compact
    def __call__(self, x):
        norm = partial(linen.BatchNorm, use_running_average=True)

        def binary(x, features, window):
            init = linen.initializers.lecun_normal()
            shape = (window, window, x.shape[-1], features)
            kernel = xnor.binarize(self.param(f"kernel{features}", init, shape))
            return CONV(xnor.sign_ste(x), kernel, (1, 1), "SAME")

        x = linen.max_pool(linen.relu(linen.Conv(16, (3, 3))(x)), (2, 2), (2, 2))
        y = binary(norm()(x), 24, 3)
        y = linen.max_pool(linen.relu(y), (3, 3), (2, 2), "SAME")
        y = binary(norm()(linen.Dropout(0.3, deterministic=True)(y)), 10, 1)
        return linen.Dense(3)(jnp.clip(y, -1, 1).mean((1, 2)))


class Equinox(eqx.Module):
    """A channels-first model of one image, for `jax.vmap`."""

    stem: eqx.nn.Conv2d
    scale: jax.Array
    kernels: list
    pool: eqx.nn.MaxPool2d
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c, d, e = jax.random.split(key, 5)
        self.stem = eqx.nn.Conv2d(3, 16, 3, padding=1, key=a)
        self.scale = jax.random.normal(b, (2, 16))
        self.kernels = [
            0.1 * jax.random.normal(c, (3, 3, 16, 24)),
            0.1 * jax.random.normal(d, (24 * 16, 20)),
        ]
        self.pool = eqx.nn.MaxPool2d(2, 2)
        self.head = eqx.nn.Linear(20, 4, key=e)

    def __call__(self, x):
        x = jax.nn.relu(self.stem(x))
        x = x * self.scale[0][:, None, None] + self.scale[1][:, None, None]
        kernel = jnp.transpose(xnor.binarize(self.kernels[0]), (3, 2, 0, 1))
        x = lax.conv_general_dilated(xnor.sign_ste(x)[None], kernel, (1, 1), "SAME")[0]
        x = self.pool(x) - 0.3
        x = jnp.ravel(xnor.sign_ste(x)) @ xnor.binarize(self.kernels[1])
        return self.head(x)


def closure():
    """A function with closed-over weights and several ways to write a sign."""
    kernels = [jax.random.normal(key, (64, 64)) for key in keys(6)]
    first, last = kernels[0][:20], kernels[1][:, :5]
    bias = kernels[1][0]

    def function(x):
        x = x @ first
        x = jnp.where(x >= 0, 1.0, -1.0) @ xnor.binarize(kernels[1]) + bias
        x = (2.0 * (x > 0) - 1.0) @ xnor.binarize(kernels[2]) + bias
        x = (1 - 2 * (x < 0).astype(jnp.float32)) @ xnor.sign(kernels[3]) + bias
        x = jnp.where(x < 0.5, -jnp.ones_like(x), 1) @ xnor.binarize(kernels[4]) * 0.3
        x = jnp.tanh(x + bias)
        x = (x + lax.stop_gradient(xnor.sign(x) - x)) @ xnor.binarize(kernels[5])
        return x @ last

    return function, (20,)


def nnx_network(make, *shape) -> tuple[nnx.Module, tuple[int, ...]]:
    model = make(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, perturbed(state)), shape


def linen_network():
    variables = Linen().init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    return partial(Linen().apply, perturbed(variables)), (12, 12, 3)


NETWORKS = {
    "reactnet": lambda: nnx_network(Residual, 8, 8, 3),
    "squeeze and excite": lambda: nnx_network(partial(Residual, excite=True), 8, 8, 3),
    "binary densenet": lambda: nnx_network(Dense, 6, 6, 2),
    "given signs": lambda: nnx_network(GivenSigns, 9, 8, 2),
    "groups": lambda: nnx_network(Grouped, 7, 6, 2),
    "attention": lambda: nnx_network(Attention, 5, 6),
    "own call": lambda: nnx_network(Own, 9),
    "linen": linen_network,
    "equinox": lambda: (jax.vmap(Equinox(jax.random.key(0))), (3, 8, 8)),
    "closure": closure,
}
# The networks that are tested without the marker `slow`.
FAST = "own call", "equinox", "closure"
PRODUCTS = dict.fromkeys(NETWORKS, 2) | {
    "given signs": 3,
    "groups": 3,
    "attention": 4,
    "own call": 3,
    "closure": 5,
}


def images(count, *shape, seed=1):
    x = np.random.default_rng(seed).normal(size=(count, *shape))
    return jnp.asarray(x, jnp.float32)


def mismatches(model, packed, x):
    """The number of images with other logits or classes; a flipped sign shows there."""
    wanted, got = np.asarray(jax.jit(model)(x)), np.asarray(packed(x))
    assert got.shape == wanted.shape and got.dtype == np.float32
    least = 1e-5 * np.abs(wanted).max()
    far = (np.abs(got - wanted) > least).reshape(len(x), -1)
    # Of equal logits, rounding decides which is the largest.
    chosen = np.take_along_axis(wanted, got.argmax(-1, keepdims=True), -1)[..., 0]
    classes = (wanted.max(-1) - chosen > least).reshape(len(x), -1)
    return int((far.any(-1) | classes.any(-1)).sum())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
        for name in NETWORKS
    ],
)
def test_packed_networks_match_float_after_save_and_load(name, tmp_path):
    model, shape = NETWORKS[name]()
    packed = xnor.pack(model, example=images(3, *shape))
    binary = [n for n in packed.nodes if isinstance(n, graph.BinaryConv)]
    assert len(binary) == PRODUCTS[name]
    assert sum(row.kind == "binary" for row in packed.report.rows) == len(binary)
    xnor.save(tmp_path / "file", packed)
    loaded = xnor.load(tmp_path / "file", backend="xla")
    assert mismatches(model, loaded, images(1000, *shape)) == 0
    # Another batch size, and the compiled engine if it was built.
    assert (
        mismatches(model, xnor.load(tmp_path / "file"), images(7, *shape, seed=2)) == 0
    )
    c_engine.check(loaded, images(7, *shape, seed=2))
    assert loaded.report == packed.report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "dense"])
def test_extreme_batch_norm_scales_match_float(name):
    """Negative, zero, tiny and large BatchNorm scales; means in multiples of 1/2."""
    make, shape = {"residual": (Residual, (6, 6, 3)), "dense": (Dense, (4, 4, 2))}[name]
    model = packed_networks.randomized(
        nnx.eval_shape(lambda: make(nnx.Rngs(0))), exact=True
    )
    for _, module in nnx.iter_modules(model):
        # Larger scales overflow float32, and there is nothing to compare.
        if isinstance(module, nnx.BatchNorm):
            scale = module.scale[...]
            module.scale[...] = jnp.where(jnp.abs(scale) > 1e20, 1e4, scale)
    x = packed_networks.images(64, *shape)
    packed = xnor.pack(model, example=x[:2])
    assert mismatches(model, packed.with_backend("xla"), x) == 0
    c_engine.check(packed, x)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_batch_norm_after_a_real_convolution_is_part_of_its_node(relu, exact, tmp_path):
    net = packed_networks.Net(
        (6, 5, 3),
        packed_networks.conv(3, 33, (3, 3), use_bias=False),
        packed_networks.norm(33),
        nnx.relu if relu else lambda x: x,
        lambda x: xnor.nn.MaxPool(2, 1)(x) + x[:, 1:, 1:],  # no sign follows at once
        packed_networks.block(33, 20, (3, 3)),
        xnor.nn.GlobalAveragePool(),
        packed_networks.linear(20, 4),
    )
    model = packed_networks.randomized(net, exact=exact)
    packed = xnor.pack(model)
    first = packed.nodes[0]
    assert isinstance(first, graph.Conv) and first.scaled
    assert first.epilogue == (graph.RELU if relu else graph.AFFINE)
    assert packed.nodes[1].kind != "elementwise"
    x = images(64, 6, 5, 3)
    xnor.save(tmp_path / "file", packed)
    loaded = xnor.load(tmp_path / "file")
    assert loaded.nodes[0].scaled
    for backend in ("xla", "auto"):
        assert mismatches(model, loaded.with_backend(backend), x) == 0
    c_engine.check(loaded, x)


@pytest.mark.slow
def test_resnet18_packs_and_reports_layer_paths(tmp_path):
    options = {"image_shape": (32, 32, 3), "classes": 4}
    model = packed_networks.randomized(
        nnx.eval_shape(lambda: xnor.models.ResNet18(**options, rngs=nnx.Rngs(0)))
    )
    packed = xnor.pack(model)
    rows = packed.report.rows
    assert [row.name for row in rows if row.kind == "binary"][:2] == [
        "residual2/block1/layer",
        "residual2/block2/layer",
    ]
    assert sum(row.kind == "binary" for row in rows) == 16
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert packed.report.bytes_before == 4 * sum(leaf.size for leaf in params)
    xnor.save(tmp_path / "file", packed)
    assert (tmp_path / "file").stat().st_size < packed.report.bytes_before / 15
    x = images(4, 32, 32, 3)
    assert mismatches(model, xnor.load(tmp_path / "file", backend="xla"), x) == 0
    c_engine.check(packed, x)


@pytest.mark.parametrize("make", [Own, Residual])
def test_training_mode_is_refused_with_a_fix(make):
    model = make(nnx.Rngs(0))
    x = images(2, *((9,) if make is Own else (8, 8, 3)))
    with pytest.raises(
        ValueError, match=r"pack: .*training mode.*call model\.eval\(\)"
    ):
        xnor.pack(model, example=x)
    with pytest.raises(
        ValueError, match=r"pack: .*training mode.*call model\.eval\(\)"
    ):
        xnor.pack(lambda x: model(x), example=x)


W = [jax.random.normal(key, (16, 16)) for key in keys(3, 5)]


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (jnp.tanh, "input is not known to be ±1: it comes from tanh"),
        (lambda x: x / jnp.abs(x), "it comes from div .*test_compiler.py"),
        (jnp.sign, r"jnp\.sign .*gives 0 at 0; use xnor_jax\.sign_ste"),
        (lambda x: (x > 0).astype(jnp.float32), "it comes from to_float"),
        (lambda x: xnor.sign(x) + 1e-3, "it comes from add"),
        (lambda x: 0.5 * xnor.sign(x), "mul .*scales the signs; scale the product"),
        (lambda x: x, "it comes from dense"),
    ],
)
def test_binary_kernel_without_sign_inputs_is_refused(between, message):
    with pytest.raises(ValueError, match=f"pack: .*{message}"):
        xnor.pack(
            lambda x: between(x @ W[0]) @ xnor.binarize(W[1]), example=images(2, 16)
        )


def test_network_input_is_not_accepted_as_signs():
    with pytest.raises(ValueError, match="it is the network's own input"):
        xnor.pack(lambda x: x @ xnor.binarize(W[0]), example=images(2, 16))


def product(x):
    return xnor.sign_ste(x @ W[0]) @ xnor.binarize(W[1])


def integer_product(x, dtype):
    signs = jnp.where(jnp.tile(x @ W[0], 9) >= 0, 1, -1).astype(jnp.int8)
    kernel = jnp.tile(xnor.sign(W[1]), (9, 1)).astype(jnp.int8)
    return jnp.dot(signs, kernel, preferred_element_type=dtype).astype(jnp.float32)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.sort(product(x)), r"the primitive sort .*test_compiler\.py"),
        (lambda x: lax.erf_inv(product(x)), "the primitive erf_inv"),
        (lambda x: jnp.cumsum(product(x), 1), r"primitive cumsum .*test_compiler\.py"),
        (lambda x: lax.top_k(product(x), 3)[0], r"primitive top_k .*test_compiler\.py"),
        (lambda x: jnp.fft.fft(product(x)).real, "primitive fft"),
        (lambda x: (product(x) * 1j).imag, r"imag .*test_compiler\.py"),
        (lambda x: product(x) + product(x).astype(int), "got int32"),
        (
            lambda x: (product(x).astype(jnp.int32) % 3).astype(jnp.float32),
            r"convert_element_type .*test_compiler\.py.* float32, got int32",
        ),
        (
            lambda x: lax.scan(lambda c, y: (c + y, c), x[:, 0], product(x).T)[0],
            r"add .*test_compiler\.py.*, got \[N\]; keep the last axis",
        ),
        (
            lambda x: lax.while_loop(
                lambda y: y.sum() > 1, lambda y: y / 2, product(x)
            ),
            r"while .*test_compiler\.py.*use jnp\.where",
        ),
        (lambda x: product(x) if x.sum() > 0 else x, r"compiler\.py:\d+ .*jnp\.where"),
        (lambda x: product(x)[product(x) > 0], r"compiler\.py:\d+ .*jnp\.where"),
        (lambda x: product(x) * np.array(x), r"compiler\.py:\d+ .*input's values"),
        (lambda x: product(x)[:, : int(x[0, 0])], r"compiler\.py:\d+ .*input's values"),
        (lambda x: product(x) / x.shape[0], "depends on the batch size"),
        (lambda x: lax.map(product, x[:, None])[:, 0], r"compiler\.py.* batch size"),
        (
            lambda x: (xnor.sign(x)[:, :, None] * xnor.sign(W[0])).sum(1) @ W[1],
            r"reduce_sum .*compiler\.py.*, which is a product of signs; write it as",
        ),
        (lambda x: product(x - x.mean(0)), "reduces over the batch"),
        (
            lambda x: product(x.reshape(2, -1, 16)).reshape(-1, 16),
            "any batch; this one takes 2 images but fails for 3: cannot reshape",
        ),
        (
            lambda x: lax.reduce_window(
                product(x), 0.0, lax.max, (1, 2), (1, 2), "VALID"
            ),
            r"reduce_window .*test_compiler\.py.* -jnp\.inf for lax\.max",
        ),
        (lambda x: lax.cond(x.sum() > 0, product, lambda x: x @ W[1], x), "jnp.where"),
        (
            lambda x: jax.vmap(lambda v: lax.cond(v[0] > 0, product, jnp.negative, v))(
                x
            ),
            "jnp.where instead of a lax.cond or lax.switch under vmap",
        ),
        (lambda x: {"a": product(x), "b": x}, "one array, got 2"),
        (lambda x: {"a": product(x)}, "one array, got a dict"),
        (lambda x: product(x) > 0, "returns floats, got bool"),
        (lambda x: product(x) @ W[2].at[0].set(jnp.inf), "a finite kernel, got NaN or"),
        (lambda x: integer_product(x, jnp.int8), "sums of up to 144 overflow int8"),
        (lambda x: product(x).argmax(-1), "argmax"),
        (lambda x: product(x.astype(jnp.bfloat16)), "float32"),
        (lambda x: x @ W[0], "expected a model with a binary layer"),
        (lambda x: jnp.ones(3), "does not depend on its input"),
        (lambda x: product(x) * jnp.nan, "the constant contains NaN"),
        (lambda x: product(lax.round(x)), r"round .*test_compiler\.py.* jnp\.round"),
        (
            lambda x: jnp.pad(product(x), ((0, 0), (0, 1)), constant_values=np.inf),
            r"pad .*test_compiler\.py.* below 1e30 in magnitude or -jnp\.inf, got inf",
        ),
        (lambda x: product(x) ** 70, r"test_compiler\.py.* -64 to 64, got 70"),
        (
            lambda x: lax.fori_loop(
                0, 1000, lambda i, y: jnp.tanh(jnp.abs(y) + y * y) - 0.5, product(x)
            ),
            r"at most 4096 operations, got \d{4}; loops are unrolled",
        ),
        (
            lambda x: (
                jnp.where(x > 0, 1, -1).astype(jnp.uint8).astype(jnp.float32)
                @ xnor.binarize(W[1])
            ),
            "not known to be ±1: it comes from convert",
        ),
    ],
)
def test_unsupported_operations_are_named(function, message):
    with pytest.raises(ValueError, match=f"^pack: .*{message}") as error:
        xnor.pack(function, example=images(2, 16))
    assert "\n" not in str(error.value)


def test_invalid_model_or_example_is_refused():
    with pytest.raises(TypeError, match="expected an nnx.Module or a function, got"):
        xnor.pack({})
    with pytest.raises(ValueError, match="expected an example"):
        xnor.pack(product)
    with pytest.raises(ValueError, match=r"an example \[N, \.\.\.\]"):
        xnor.pack(product, example=1.0)
    with pytest.raises(TypeError, match="floating point numbers, got uint8"):
        xnor.pack(product, example=np.zeros((1, 16), np.uint8))
    for example in ({"a": images(1, 16)}, "16", [[1.0, 2.0], [3.0]]):
        with pytest.raises(TypeError, match="an example array .*, got (dict|str|list)"):
            xnor.pack(product, example=example)
    with pytest.raises(ValueError, match="inputs of 1 to 4 axes, got shape"):
        xnor.pack(product, example=images(1, 1, 1, 1, 1, 16))
    with pytest.raises(ValueError, match="a mask is for an nnx.Module"):
        xnor.pack(product, True, example=images(1, 16))
    with pytest.raises(TypeError, match="one that is packed already"):
        xnor.pack(xnor.pack(product, example=images(1, 16)))


def test_pack_is_refused_under_a_transformation():
    example = np.ones((2, 16), np.float32)

    def traced_weights(w):
        return xnor.pack(lambda x: xnor.sign_ste(x) @ w, example=example)(example)

    for function in (traced_weights, lambda _: xnor.pack(product, example=example)):
        with pytest.raises(TypeError, match="^pack: .* outside jit, vmap and grad"):
            jax.jit(function)(np.ones((16, 4)))


def test_float_products_are_not_rounded_to_a_devices_default():
    conv = xnor.nn.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0))
    kernel = xnor.binarize(np.random.default_rng(0).normal(size=(8, 8)))
    head = np.ones((8, 5), np.float32)

    def network(x):
        tokens = conv(x).reshape(x.shape[0], -1, 8)
        tokens = tokens @ (tokens.swapaxes(1, 2) @ tokens)
        return (xnor.sign_ste(tokens) @ kernel).sum(1) @ head

    x = np.ones((2, 4, 4, 3), np.float32)
    assert_full_precision(xnor.pack(network, example=x).with_backend("xla"), x)


SPELLINGS = [
    lambda x: jnp.where(x >= 0, 1, -1),
    lambda x: 2 * (x > 0) - 1,
    lambda x: jnp.sign(jnp.sign(x) + 0.1),
    lambda x: jnp.where(x == 0, -1.0, jnp.sign(x)),
    lambda x: jnp.where((x >= -0.5) & (x < 1), 1.0, -1.0),
    lambda x: jnp.where(x >= jnp.roll(x, 1, -1), -1.0, 1.0),
    lambda x: jnp.clip(x, -1, 1) + lax.stop_gradient(xnor.sign(x) - jnp.clip(x, -1, 1)),
    # A thermometer: each number as the signs of its distances to some thresholds.
    lambda x: jnp.where(x[:, :4, None] >= jnp.linspace(-3, 3, 4), 1.0, -1.0).reshape(
        -1, 16
    ),
    lambda x: jnp.where(jnp.arange(16) < 3, jnp.ones(16), xnor.sign(x)),
    # Of three outcomes, the first and the last alike; all alike.
    lambda x: xnor.sign_ste((x == 0).astype(jnp.float32) - 0.5),
    lambda x: xnor.sign_ste(0.5 - jnp.sign(x) ** 2),
    lambda x: xnor.sign_ste(jnp.where(x == 1, 2.0, -3.0)),
    lambda x: xnor.sign_ste(xnor.sign_ste(x) - 2),
    lambda x: 1 - 2 * (xnor.sign_ste(x) <= 1.5),
]


def test_signs_in_other_spellings_are_packed():
    first = jnp.round(4 * W[0])
    kernels = [jax.random.normal(key, (16, 16)) for key in keys(len(SPELLINGS))]

    def function(x):
        x = x @ first
        for sign, kernel in zip(SPELLINGS, kernels, strict=True):
            x = sign(x) @ xnor.sign(kernel)
        return x + integer_product(x, jnp.int32)

    # Integers: each sum of signs is exact, and many are 0 or at a threshold.
    x = jnp.round(images(200, 16))
    packed = xnor.pack(function, example=x[:2])
    count = sum(row.kind == "binary" for row in packed.report.rows)
    assert count == len(SPELLINGS) + 1
    assert mismatches(function, packed.with_backend("xla"), x) == 0
    c_engine.check(packed, x)


@pytest.mark.slow
def test_norms_masks_and_paddings_of_jax_libraries_are_packed():
    """Uniform LayerNorm scales, `jnp.var`, causal attention, edge padding, resizing."""
    norm = nnx.LayerNorm(16, rngs=nnx.Rngs(0))

    def function(x):
        x = jnp.pad(x, ((0, 0), (1, 2), (0, 0)), mode="edge") @ W[0]
        x = xnor.sign_ste(norm(x) + 0.01) @ xnor.sign(W[1])
        x = x / 4 + (x % 3)
        heads = x.reshape(*x.shape[:2], 2, 8)
        mask = jnp.tril(jnp.ones((1, 1, 7, 7)))
        x = x + nnx.dot_product_attention(heads, heads, heads, mask=mask).reshape(
            x.shape
        )
        x = jax.image.resize(x, (x.shape[0], 9, 16), "bilinear")
        x = (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(1, keepdims=True) + 1e-3)
        return xnor.sign_ste(x - 0.01) @ xnor.binarize(W[2])

    packed = xnor.pack(function, example=images(2, 4, 16))
    x = images(40, 4, 16)
    assert mismatches(function, packed.with_backend("xla"), x) == 0
    c_engine.check(packed, x)


@pytest.mark.slow
def test_patches_of_signs_become_a_convolution():
    kernels = jax.random.normal(jax.random.key(3), (2, 8 * 6, 8))

    def function(x):
        for kernel in kernels:
            patches = lax.conv_general_dilated_patches(
                xnor.sign_ste(x + 0.01),
                (2, 3),
                (1, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            x = patches @ xnor.binarize(kernel)
        return x.mean((1, 2))

    packed = xnor.pack(function, example=images(2, 5, 6, 8))
    assert [row.kind for row in packed.report.rows].count("binary") == 2
    assert not any(isinstance(node, graph.Conv) for node in packed.nodes)
    x = images(40, 5, 6, 8)
    assert mismatches(function, packed.with_backend("xla"), x) == 0


@pytest.mark.slow
def test_loops_over_the_input_and_stacked_results_are_packed():
    kernels = jnp.stack([xnor.sign(w) for w in W])

    def function(x):
        def step(state, frame):
            state = xnor.sign_ste(state + frame) @ kernels[0]
            return state, state

        state, states = lax.scan(step, jnp.zeros((x.shape[0], 16)), x.swapaxes(0, 1))
        # A carry that counts makes this a `while`.
        _, y = lax.while_loop(
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, xnor.sign_ste(c[1]) @ kernels[c[0]]),
            (0, state),
        )
        return jnp.stack([y, states.sum(0), xnor.sign(states[1])]).sum(0)

    packed = xnor.pack(function, example=images(2, 4, 16))
    x = jnp.round(images(60, 4, 16))
    assert mismatches(function, packed.with_backend("xla"), x) == 0
    c_engine.check(packed, x)

    # The first of the stacked carries is a constant, the same along two axes.
    def carries(x):
        def step(y, kernel):
            return xnor.sign_ste(y + x[:, :1]) @ kernel, y

        carry = jnp.broadcast_to(W[0][0], (x.shape[0], 5, 16))
        return lax.scan(step, carry, kernels)[1].sum((0, 2))

    packed = xnor.pack(carries, example=images(2, 4, 16))
    assert mismatches(carries, packed.with_backend("xla"), x) == 0
    # Ties in a loop of kernels ±α: the meaning is α · n there too.
    scaled = jnp.stack([xnor.binarize(w) for w in W])

    def ties(x):
        return lax.scan(lambda y, k: (xnor.sign_ste(y) @ k, None), x @ W[0], scaled)[0]

    xnor.pack(ties, example=images(64, 16))


def test_signs_without_channels_and_of_images_last_are_packed():
    kernel, column = xnor.sign(W[1]), xnor.sign(W[2][:, 0])

    def function(x):
        y = xnor.sign_ste(x.sum(-1, keepdims=True)) * (xnor.sign_ste(x) @ kernel)
        share = xnor.sign_ste(-x.max(-1) - 1)[:, None]
        votes = jnp.where(y.sum(-1, keepdims=True) > 2, -1.0, 1.0)
        turned = (kernel.T @ xnor.sign_ste(2 * x.T - jnp.arange(16.0)[:, None])).T
        one = jax.vmap(lambda v: xnor.sign_ste(v) @ column)(turned)
        return jnp.concatenate([y, share, votes, turned, one[:, None]], -1)

    x = jnp.round(images(200, 16))
    packed = xnor.pack(function, example=x[:2])
    np.testing.assert_array_equal(packed.with_backend("xla")(x), function(x))
    c_engine.check(packed, x)


def test_result_of_signs_is_packed():
    function = lambda x: xnor.sign_ste(product(x) + 0.01)  # noqa: E731
    packed = xnor.pack(function, example=images(2, 16))
    x = images(50, 16)
    np.testing.assert_array_equal(packed(x), function(x))


def test_loops_and_channel_indexing_are_packed():
    order = np.random.default_rng(0).permutation(16)

    def function(x):
        y = lax.fori_loop(
            0, 3, lambda i, h: xnor.sign_ste(h + 0.01) @ xnor.binarize(W[1]), x @ W[0]
        )
        y = xnor.sign_ste(y[:, order] - 0.02) @ xnor.binarize(W[2])
        parts = jnp.unstack(y.reshape(-1, 4, 4), axis=1)
        return jnp.concatenate(parts[::-1], -1) + y[:, ::-1] * jnp.arange(1.0, 17)

    packed = xnor.pack(function, example=images(2, 16))
    x = images(50, 16)
    assert mismatches(function, packed.with_backend("xla"), x) == 0
    c_engine.check(packed, x)


def test_check_allows_what_a_rounding_of_the_input_changes():
    class Packed:
        """The function on inputs that are rounded differently."""

        image_shape = (64,)

        def __init__(self, function, shift=0.0):
            self.function, self.shift = function, shift

        def __call__(self, x):
            moved = jnp.where(x[:, 1:2] > 0, self.shift, 0)
            return self.function(None, x * np.float32(1 - 2**-23)) + moved

    def rarely(_, x, above=0.5):
        return jnp.where(x[:, :1] > above, jnp.sign(jnp.sin(1e8 * x)), 1)

    def always(_, x):
        return rarely(_, x, above=-9.0)

    compiler._check(Packed(rarely), rarely, None, None)
    for packed in (Packed(rarely, shift=0.1), Packed(always)):
        with pytest.raises(ValueError, match="disagrees with the model"):
            compiler._check(packed, packed.function, None, None)


def test_check_detects_a_shifted_threshold(monkeypatch):
    model, shape = nnx_network(Own, 9)
    lower = compiler.lower

    def shifted(*args):
        nodes = list(lower(*args))
        index, node = next(
            (index, n)
            for index, n in enumerate(nodes)
            if getattr(n, "epilogue", "") == graph.THRESHOLD
        )
        threshold = node.arrays["threshold"]
        arrays = {**node.arrays, "threshold": threshold + 2}
        nodes[index] = compiler.dataclasses.replace(node, arrays=arrays)
        return tuple(nodes)

    monkeypatch.setattr(compiler, "lower", shifted)
    with pytest.raises(ValueError, match="disagrees with the model"):
        xnor.pack(model, example=images(16, *shape))


def float_product(kernel):
    binary = xnor.scale(kernel) * xnor.sign(kernel)
    return lambda x: CONV(xnor.sign_ste(x), binary, (1, 1), "SAME")


def exact_product(kernel):
    """The exact product: an integer sum times α."""
    alpha, signs = xnor.scale(kernel), xnor.sign(kernel)
    return lambda x: alpha * CONV(xnor.sign(x), signs, (1, 1), "SAME")


SUMS = {
    "flip": lambda x: x + jnp.flip(x, 1),
    "roll": lambda x: x - jnp.roll(x, 1, 2),
    "slices": lambda x: (x[:, ::2] + x[:, 1::2]) / 2,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_products_that_cancel_are_zero(name):
    """XLA would fuse a product into the sum and round it once: not to 0."""
    first, *kernels = (jax.random.normal(k, (3, 3, 8, 8)) for k in keys(3))
    first_product, second = map(exact_product, kernels)

    def function(x):
        x = CONV(x, first, (1, 1), "SAME")
        return second(SUMS[name](first_product(x))).mean((1, 2))

    x = images(16, 6, 6, 8)
    packed, wanted = xnor.pack(function, example=x), function(x)  # op by op
    np.testing.assert_allclose(packed(x), wanted, atol=1e-5 * jnp.abs(wanted).max())


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_zero_sums_of_signs_ignore_float_rounding(backend):
    """The sums go straight into signs, so the thresholds are 0."""
    first, *kernels = (jax.random.normal(k, (3, 3, 8, 8)) for k in keys(4))

    def network(product, x):
        x = CONV(x, first, (1, 1), "SAME")
        for kernel in kernels:
            x = product(kernel)(x)
        return x.mean((1, 2))

    x = images(128, 6, 6, 8)
    function, exact = (partial(network, p) for p in (float_product, exact_product))
    # Float rounding turns many ties the other way, also in the example for `pack`.
    assert mismatches(function, jax.jit(exact), x) > len(x) / 2
    packed = xnor.pack(function, example=x, backend=backend)
    assert mismatches(exact, packed, x) == 0


def test_an_example_may_be_a_shape():
    x = images(4, 16)
    packed = xnor.pack(product, example=jax.ShapeDtypeStruct((1, 16), jnp.float32))
    np.testing.assert_allclose(packed(x), product(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [False, True])
def test_ties_of_products_with_a_scale_per_image(constant):
    """`n·K + (−n)·K` is 0, and not the rounding error of one of the products."""
    first, second, last = (xnor.sign(jax.random.normal(k, (16, 16))) for k in keys(3))
    x = images(200, 16)

    def function(x):
        signs = xnor.sign_ste(x)
        scale = 0.3 if constant else jnp.abs(x).mean(-1, keepdims=True)
        return xnor.sign_ste((signs @ first) * scale + (signs @ second) * scale) @ last

    sums = np.where(x >= 0, 1, -1) @ np.asarray(first + second)
    assert (sums == 0).any()
    wanted = np.where(sums >= 0, 1, -1) @ np.asarray(last)
    for example in (x, np.zeros((1, 16))):
        packed = xnor.pack(function, example=example)
        if "cpu" in xnor.ops.available_backends():
            np.testing.assert_array_equal(packed.with_backend("cpu")(x), wanted)


def test_ties_of_a_bias_before_a_sign_that_is_no_threshold():
    first, last = (xnor.sign(jax.random.normal(k, (15, 15))) for k in keys(2))
    alpha = np.float32(0.1)
    x = images(200, 15)

    def function(x):
        y = (xnor.sign_ste(x) @ first) * alpha - np.float32(3 * alpha)
        return xnor.sign_ste(jnp.where(y > -1, y, -y)) @ last

    wanted = function(x)  # op by op
    packed = xnor.pack(function, example=x)
    if "cpu" in xnor.ops.available_backends():
        np.testing.assert_array_equal(packed.with_backend("cpu")(x), wanted)


def test_clamp_with_reversed_bounds():
    def function(x):
        return xnor.sign_ste(lax.clamp(0.7, x, -0.5) + x) @ xnor.binarize(W[1])

    x = images(64, 16)
    packed = xnor.pack(function, example=x)
    np.testing.assert_allclose(packed(x), function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("example", [np.ones((0, 16)), np.full((1, 16), np.nan)])
def test_check_without_numbers_in_the_example(example, monkeypatch):
    xnor.pack(product, example=example)
    monkeypatch.setattr(compiler, "reference", lambda *args: product(args[-1]) + 1)
    with pytest.raises(ValueError, match="disagrees with the model"):
        xnor.pack(product, example=example)


@pytest.mark.parametrize("alpha", [0.1, 0.0271, 1 / 3, 0.77])
@pytest.mark.parametrize("kind", ["bias", "mean", "pool"])
@pytest.mark.parametrize("example", [False, True])
def test_ties_of_a_rounded_product_and_a_bias(alpha, kind, example):
    """`α · n` is rounded before the bias is added: fused, an exact 0 gets a sign."""
    alpha = np.float32(alpha)
    x = np.asarray(images(200, 2, 2, 33))
    first, last = (
        np.where(jax.random.bernoulli(k, 0.5, (33, 33)), 1, -1) for k in keys(2)
    )
    # In each channel one of the sums −15, −13, … is a tie.
    ties = alpha * np.float32(2 * (np.arange(33) % 16) - 15)
    signs = {"bias": 1, "mean": -1, "pool": -1}

    def function(x):
        y = xnor.sign_ste(x) @ (first * alpha).astype(np.float32)
        y = y + ties if kind == "bias" else y - ties
        y = nnx.max_pool(y, (2, 2), (2, 2)) if kind == "pool" else y
        return xnor.sign_ste(y) @ last.astype(np.float32)

    sums = (np.where(x >= 0, 1, -1) @ first).astype(np.float32)
    y = (alpha * sums).astype(np.float32) + signs[kind] * ties
    assert (y == 0).any()
    y = y.max((1, 2), keepdims=True) if kind == "pool" else y
    wanted = np.where(y >= 0, 1, -1) @ last
    packed = xnor.pack(function, example=x[:1] if example else np.zeros((1, 2, 2, 33)))
    for backend in xnor.ops.available_backends():
        if backend != "gpu":
            found = packed.with_backend(backend)(x)
            np.testing.assert_array_equal(found, wanted, err_msg=backend)


def test_check_detects_a_flipped_tie(monkeypatch):
    """A threshold of 1 instead of 0 flips only the ties."""
    first, *kernels = (jax.random.normal(k, (16, 16)) for k in keys(4))

    def function(x):
        x = x @ first
        for kernel in kernels:
            x = xnor.sign_ste(x) @ xnor.binarize(kernel)
        return x

    lower = compiler.lower

    def shifted(*args):
        nodes = list(lower(*args))
        for index, node in enumerate(nodes):
            if isinstance(node, graph.BinaryConv) and "threshold" in node.arrays:
                assert (node.arrays["threshold"] == 0).all()
                arrays = {**node.arrays, "threshold": node.arrays["threshold"] + 1}
                nodes[index] = compiler.dataclasses.replace(node, arrays=arrays)
        return tuple(nodes)

    xnor.pack(function, example=images(16, 16))
    monkeypatch.setattr(compiler, "lower", shifted)
    with pytest.raises(ValueError, match="disagrees with the model"):
        xnor.pack(function, example=images(16, 16))


@st.composite
def programs(draw):
    """The seed and steps of a small random network, for `make_network`."""
    kinds = ("shift", "pool", "relu", "join", "prelu", "flip", "mean", "max", "none")
    step = st.tuples(st.sampled_from(kinds), st.booleans(), st.integers(1, 3))
    return draw(st.integers(0, 2**16)), draw(st.lists(step, min_size=2, max_size=4))


def make_network(product, seed, steps):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    # Few binary digits: sums are exact in any order, and many are 0.
    first = jnp.asarray(rng.integers(-8, 9, (3, 3, 2, 8)) / 8, jnp.float32)
    channels, layers = 8, []
    for kind, shortcut, window in steps:
        multiply = product(normal(window, window, channels, 8))
        layers.append((kind, shortcut, multiply, normal(3, 8)))
        channels = 16 if kind == "join" else 8

    def function(x):
        x = CONV(x, first, (1, 1), "SAME")
        for kind, shortcut, multiply, (scale, shift, slope) in layers:
            y = multiply(x)
            if kind == "relu":
                y = jax.nn.relu(y)
            if kind == "pool":
                y = nnx.max_pool(y, (2, 2), (1, 1), "SAME")
            if kind in ("shift", "pool", "relu"):
                y = y * scale + shift
            if kind == "prelu":
                y = y + shift
                y = jnp.where(y > 0, y, slope * y) + scale
            if kind == "flip":  # 0 where the sum is 0
                y = shift - (y + shift)
            if kind == "mean":
                y = nnx.avg_pool(y + shift, (3, 3), (1, 1), "SAME") + scale
            if kind == "max":  # without a scale or shift
                y = nnx.max_pool(y, (3, 3), (1, 1), "SAME")
            if shortcut and y.shape == x.shape:
                y = y + x
            x = jnp.concatenate([y, x[..., :8]], -1) if kind == "join" else y
        return x.mean((1, 2))

    return function


def check_program(program, pack):
    """Compare a random network with its exact products; evaluated op by op."""
    x = packed_networks.images(16, 5, 5, 2, seed=program[0])
    packed = pack(make_network(float_product, *program), example=x[:2])
    wanted, got = make_network(exact_product, *program)(x), packed(x)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    c_engine.check(packed, x)


@hypothesis.settings(max_examples=2)
@hypothesis.given(programs())
def test_random_graphs_match_exact_products(program):
    check_program(program, partial(xnor.pack, backend="xla"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_500_random_graphs_match_exact_products(part):
    def pack(function, example):  # for one backend: "auto" traces two
        backend = "cpu" if "cpu" in ops.available_backends() else "xla"
        return compiler.pack_unchecked(function, example=example).with_backend(backend)

    @hypothesis.seed(part)
    @hypothesis.settings(max_examples=125, derandomize=False, database=None)
    @hypothesis.given(programs())
    def check(program):
        check_program(program, pack)

    check()
