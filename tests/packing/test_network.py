"""Packed networks against the float model: equal signs, sums and logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import packed_networks
import pytest
from flax import nnx
from packed_networks import Net, block, conv, linear, norm, signals, volumes

import xnor_jax as xnor
from xnor_jax.nn import AvgPool, Flatten, GlobalAveragePool, MaxPool

# tests/ops covers these two; on a CPU, "gpu" is slow and "pallas" is "xla".
BACKENDS = sorted({*xnor.ops.available_backends()} - {"gpu", "pallas"})


def grouped():
    """Groups that end within a word, strides, rectangles, dilation, odd sizes."""
    return Net(
        (11, 9, 3),
        conv(3, 36, (3, 2), strides=(2, 1), padding=((1, 0), (2, 1))),
        norm(36),
        nnx.relu,
        block(
            36, 40, (3, 3), strides=(2, 1), padding=2, feature_group_count=4, relu=False
        ),
        block(40, 33, (2, 3), kernel_dilation=(2, 1), use_bias=False),
        MaxPool((2, 3), (1, 2), ((1, 0), (1, 1))),
        block(33 * 4 * 7, 21, norm_features=33),
        block(21, 17, relu=False, use_bias=False),
        linear(17, 5),
    )


def pools():
    """Pools before and after ReLU and BatchNorm, two in a row, and a global mean."""
    return Net(
        (13, 13, 2),
        conv(2, 34, (5, 5), use_bias=False),
        MaxPool(2, 2),
        norm(34),
        nnx.relu,
        MaxPool(3, 1, "SAME"),
        norm(34, use_scale=False),
        block(34, 35, (3, 3)),
        AvgPool(3, 2, 1),
        MaxPool(2, 1),
        block(35, 20, (1, 1)),
        AvgPool((2, 1), 1, "SAME"),
        nnx.relu,
        norm(20, use_bias=False),
        xnor.nn.BinaryConv(20, 33, 1 * (2, 2), rngs=nnx.Rngs(0)),
        norm(33, use_scale=False),
        nnx.relu,
        GlobalAveragePool(),
        linear(33, 4, use_bias=False),
    )


def dense():
    return Net((7,), linear(7, 70), block(70, 45), block(45, 6))


def scaled():
    """Layers with the paper's K: nothing folds across it, in either direction."""
    return Net(
        (8, 7, 3),
        conv(3, 34, (3, 3)),
        norm(34),
        nnx.relu,
        block(34, 36, (3, 2), strides=2, padding=1, input_scale=True),
        MaxPool(2, 2),
        block(36, 33, (1, 1)),
        block(33 * 4, 30, norm_features=33, input_scale=True),
        linear(30, 4),
    )


NETWORKS = {
    "grouped": grouped,
    "pools": pools,
    "signals": signals,
    "volumes": volumes,
    "dense": dense,
    "scaled": scaled,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    NETWORKS,
)
def test_networks_with_extreme_constants_match_float(name):
    model = packed_networks.randomized(
        nnx.eval_shape(NETWORKS[name]), exact=name != "scaled"
    )
    before = nnx.state(model)
    packed = xnor.pack(model, backend="xla")
    x = packed_networks.images(6, *model.image_shape)
    packed_networks.check_equal(model, packed, x)
    for a, b in zip(*map(jax.tree.leaves, (before, nnx.state(model))), strict=True):
        assert a is b


@pytest.mark.parametrize(
    "backend", [pytest.param("float", marks=pytest.mark.slow), "auto"]
)
def test_lenet5_with_extreme_constants_matches_float(backend):
    model = nnx.eval_shape(
        lambda: xnor.models.LeNet5(image_shape=(20, 18, 2), rngs=nnx.Rngs(0))
    )
    packed = xnor.pack(packed_networks.randomized(model, exact=backend == "auto"))
    x = packed_networks.images(9, 20, 18, 2)
    packed_networks.check_equal(model, packed.with_backend(backend), x)


@pytest.mark.slow
def test_nin_with_extreme_constants_matches_float():
    model = nnx.eval_shape(
        lambda: xnor.models.NIN(image_shape=(12, 10, 3), rngs=nnx.Rngs(0))
    )
    packed = xnor.pack(packed_networks.randomized(model), backend="xla")
    packed_networks.check_equal(model, packed, packed_networks.images(4, 12, 10, 3))
    outputs = [row.output for row in packed.report.rows]
    assert outputs == 7 * ["bits"] + 2 * ["float"]


@pytest.fixture(scope="module")
def small():
    return packed_networks.randomized(
        nnx.eval_shape(
            lambda: Net(
                (6, 5, 2),
                conv(2, 35, (3, 3)),
                MaxPool(2, 1),
                block(35, 33, (3, 3), padding=1),
                AvgPool(2, 2),
                block(2 * 2 * 33, 40, norm_features=33),
                linear(40, 3),
            )
        ),
        exact=True,
    )


def test_backends_agree(small):
    packed = xnor.pack(small)
    x = packed_networks.images(7, 6, 5, 2)
    logits = packed(x)
    for backend in BACKENDS:
        np.testing.assert_allclose(
            packed.with_backend(backend)(x), logits, rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match="backend"):
        packed.with_backend("tpu")


def test_packed_model_supports_jit_vmap_and_sharding(small, compilations):
    packed = xnor.pack(small, backend="xla")
    x = packed_networks.images(8, 6, 5, 2)
    logits = packed(x)
    before = compilations()
    np.testing.assert_array_equal(packed(x + 0), logits)
    rebuilt = jax.tree.unflatten(jax.tree.structure(packed), jax.tree.leaves(packed))
    np.testing.assert_array_equal(rebuilt(x), logits)
    assert compilations() - before <= 1  # of `x + 0`

    @jax.jit
    def pairs(packed, x):
        return jax.vmap(packed)(x.reshape(4, 2, *x.shape[1:])).reshape(8, -1)

    np.testing.assert_allclose(pairs(packed, x), logits, rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), packed)
    outputs = jax.jit(jax.vmap(lambda p, x: p(x), in_axes=(0, None)))(stacked, x)
    np.testing.assert_allclose(outputs[1], logits, rtol=1e-5, atol=1e-5)

    mesh = jax.sharding.Mesh(jax.devices()[:2], "batch")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    got = packed(jax.device_put(x, sharding))
    np.testing.assert_allclose(got, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(packed)(x), logits, rtol=1e-5, atol=1e-5)

    axis_types = (jax.sharding.AxisType.Explicit,)
    explicit = jax.make_mesh((2,), ("batch",), axis_types, devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(explicit, jax.sharding.PartitionSpec("batch"))
    with pytest.raises(ValueError, match="expected images sharded over Auto axes"):
        packed(jax.device_put(x, sharding))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_gives_no_logits(small, backend):
    assert xnor.pack(small, backend=backend)(jnp.ones((0, 6, 5, 2))).shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    BACKENDS,
)
def test_sign_of_a_mean_rounds_as_the_float_network(backend):
    # Without a ReLU the terms of a mean cancel, and many means are near 0.
    block = partial(xnor.nn.XnorBlock, relu=False)
    model = Net(
        (8, 8, 3),
        conv(3, 32, (3, 3)),
        block(32, 64, (3, 3), rngs=nnx.Rngs(0)),
        GlobalAveragePool(),
        block(64, 64, rngs=nnx.Rngs(1)),
        nnx.relu,
        linear(64, 10),
    )
    model.eval()
    x = packed_networks.images(1000, 8, 8, 3)
    graphdef, state = nnx.split(model)
    wanted = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, x)
    error = jnp.abs(xnor.pack(model, backend=backend)(x) - wanted).max(-1)
    flipped = error > 1e-4 * jnp.abs(wanted).max(-1)
    # The compiled first layer may round differently; a mean in another order would
    # change one image in six.
    assert int(flipped.sum()) <= (2 if backend == "cpu" else 0)


POOLED = {
    "2/2": ((8, 8, 16), (3, 3), AvgPool(2, 2)),
    "3/2 pad 1": ((9, 7, 16), (3, 3), AvgPool(3, 2, padding=1)),
    "rank 1": ((23, 16), (3,), AvgPool(5, 2, padding=[(2, 1)])),
    "rank 3": ((5, 4, 6, 16), (2, 2, 2), AvgPool(2, (1, 2, 1))),
    "whole": ((6, 6, 16), (3, 3), AvgPool(6, 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 5])
def test_global_mean_between_signs_rounds_identically(size):
    """n = size² is not a power of 2: dividing by n and multiplying by 1/n differ."""
    shape, rngs = (size, size, 16), nnx.Rngs(0)
    conv = xnor.nn.BinaryConv(16, 24, (3, 3), use_bias=False, rngs=rngs)
    dense = xnor.nn.BinaryLinear(24, 40, use_bias=False, rngs=rngs)
    model = Net(shape, conv, GlobalAveragePool(), dense)
    model.eval()
    x = packed_networks.images(96, *shape)
    graphdef, state = nnx.split(model)
    wanted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    for backend in BACKENDS:
        packed = xnor.pack(model, backend=backend)
        np.testing.assert_array_equal(packed(x), wanted, err_msg=backend)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    POOLED,
)
def test_average_pools_between_signs_sum_in_a_fixed_order(name):
    shape, window, pool = POOLED[name]
    binary = partial(xnor.nn.BinaryConv, use_bias=False, rngs=nnx.Rngs(0))
    last = tuple(min(2, size) for size in pool.geometry(shape[:-1]).out)
    model = Net(shape, binary(16, 24, window), pool, binary(24, 40, last))
    # Sums of a few ±α may cancel: their order determines many signs.
    model.eval()
    x = packed_networks.images(96, *shape)

    @jax.jit
    def logits(state, x):
        return nnx.merge(graphdef, state)(x)

    for float_backend in ("auto", "float"):
        model.set_attributes(backend=float_backend, raise_if_not_found=False)
        graphdef, state = nnx.split(model)
        wanted = logits(state, x)
        np.testing.assert_array_equal(logits(state, x[:1]), wanted[:1])
        # The compiled library supports at most two spatial axes.
        for packed_backend in BACKENDS if len(window) < 3 else ("auto", "float", "xla"):
            packed = xnor.pack(model, backend=packed_backend)
            np.testing.assert_array_equal(
                packed(x), wanted, err_msg=f"{float_backend} {packed_backend}"
            )
            np.testing.assert_array_equal(packed(x[:5]), wanted[:5])


def test_gradients_and_wrong_inputs_are_refused(small):
    packed = xnor.pack(small)
    x = packed_networks.images(2, 6, 5, 2)
    for backend in BACKENDS:
        other = packed.with_backend(backend)
        with pytest.raises(TypeError, match="gradient"):
            jax.grad(lambda x, other=other: other(x).sum())(x)
    with pytest.raises(ValueError, match=r"expected \[N, 6, 5, 2\], got shape \(6, 5"):
        packed(x[0])
    with pytest.raises(TypeError, match="expected floating point images, got uint8"):
        packed(x.astype(jnp.uint8))
    assert packed.classes == 3


def test_report_counts_macs_and_bytes(small):
    report = xnor.pack(small).report
    rows = {row.name: row for row in report.rows}
    assert [(row.kind, row.bits, row.output) for row in report.rows] == [
        ("real", 32, "bits"),
        ("binary", 1, "bits"),
        ("binary", 1, "float"),
        ("real", 32, "float"),
    ]
    first, second, third, last = report.rows
    assert (first.real_macs, first.binary_macs) == (30 * 35 * 18, 0)
    assert (second.binary_macs, third.binary_macs) == (20 * 33 * 35 * 9, 40 * 132)
    assert last.real_macs == 120
    # Before: kernel, bias and the block's BatchNorm; after: kernel, thresholds, their
    # flips and those of the pool.
    assert first.bytes_before == 4 * (35 * 18 + 35 + 2 * 35)
    assert first.bytes_after == 4 * 35 * 18 + 4 * 35 + 5 + 5
    # Kernel, α and bias, as AvgPool takes floats; thresholds after it and their flips.
    assert second.bytes_after == -(-33 * 35 * 9 // 8) + 8 * 33 + 4 * 33 + 5
    params = jax.tree.leaves(nnx.state(small, nnx.Param))
    assert report.bytes_before == 4 * sum(leaf.size for leaf in params)
    lines = str(report).splitlines()
    assert len(lines) == 8 and "runs/2/layer" in lines[3]
    assert "2 of 4 binary" in lines[-1] and f"{report.bytes_after:,}" in lines[-1]
    assert rows["runs/2/layer"] is second


def sequential_with_signs():
    """Signs before layers that a mask makes binary, in an `nnx.Sequential`."""
    return nnx.Sequential(
        conv(3, 34, (3, 3)),
        norm(34),
        nnx.relu,
        nnx.Sequential(xnor.sign_ste, nnx.Dropout(0.5), conv(34, 33, (2, 2))),
        MaxPool(2, 2),
        norm(33),
        xnor.sign,
        MaxPool(2, 1),
        Flatten(),
        linear(33 * 2, 40),
        nnx.relu,
        xnor.nn.BinaryLinear(40, 20, binary=False, rngs=nnx.Rngs(0)),
        linear(20, 4),
    )


def test_repr_is_a_few_lines(small):
    packed = xnor.pack(small)
    text = repr(packed)
    assert text.count("\n") < 5 and len(text) < 400
    size = f"{packed.report.bytes_after:,} bytes"
    for part in (str(packed.image_shape), f"{len(packed.report.rows)} layers", size):
        assert part in text


@pytest.mark.slow
def test_sequential_network_with_mask_matches_float():
    binary = ("layers/3/layers/2/kernel", "layers/9/kernel")
    model = packed_networks.randomized(
        nnx.eval_shape(sequential_with_signs), exact=True, masked=binary
    )
    params = nnx.state(model, nnx.Param)
    mask = xnor.mask_by_path(params, lambda path, _: path in binary)
    x = packed_networks.images(5, 6, 4, 3)
    packed = xnor.pack(model, mask, example=x[:1], backend="xla")
    binarized = nnx.merge(
        nnx.graphdef(model),
        xnor.binarize(params, mask),
        nnx.state(model, nnx.Not(nnx.Param)),
    )
    wanted = jax.jit(lambda s, x: nnx.merge(nnx.graphdef(binarized), s)(x))(
        nnx.state(binarized), x
    )
    np.testing.assert_allclose(
        packed(x), wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max())
    )
    assert [row.name for row in packed.report.rows if row.kind == "binary"] == [
        "layers/3/layers/2",
        "layers/9",
    ]
    with pytest.raises(ValueError, match="expected an example"):
        xnor.pack(model, mask)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ((block(4, 8, (3, 3), binary=False),), "expected a model with a binary layer"),
        (
            (block(4, 8, (3, 3)), block(8, 8, (1, 1), dtype=jnp.bfloat16)),
            "after runs/1/.* computes in float32, got bfloat16",
        ),
        (
            (conv(4, 8, (1, 1), dtype=jnp.float16), block(8, 8, (3, 3))),
            "at Conv .* computes in float32, got float16",
        ),
    ],
)
def test_unsupported_layers_are_named(runs, message):
    model = Net((6, 6, 4), *runs)
    model.eval()
    with pytest.raises(ValueError, match=f"^pack: .*{message}"):
        xnor.pack(model)


def test_mismatched_masks_are_refused():
    model = Net((4,), linear(4, 8), block(8, 8), linear(8, 2))
    model.eval()
    params = nnx.state(model, nnx.Param)
    first = xnor.mask_by_path(params, lambda path, _: path == "runs/0/kernel")
    with pytest.raises(ValueError, match="runs/0/kernel is ±α, .* network's own input"):
        xnor.pack(model, first)
    bias = xnor.mask_by_path(params, lambda path, _: path == "runs/0/bias")
    with pytest.raises(ValueError, match="selects runs/0/bias, which is not a kernel"):
        xnor.pack(model, bias)
    with pytest.raises(ValueError, match="the mask does not match params"):
        xnor.pack(model, {"other": True})
    # The block's kernel is the only inner one, and is binary without a mask.
    assert xnor.pack(model, xnor.inner_kernels(model)).report == xnor.pack(model).report


def test_missing_or_nonfinite_params_are_refused():
    model = Net((4,), linear(4, 8), block(8, 8), linear(8, 2))
    model.eval()
    with pytest.raises(
        TypeError, match="expected an nnx.Module or a function, got dict"
    ):
        xnor.pack({})
    with pytest.raises(TypeError, match="got ShapeDtypeStruct at runs/0/bias"):
        xnor.pack(nnx.eval_shape(lambda: model))
    with pytest.raises(ValueError, match=r"an example of \[N, 4\], got \(2, 5\)"):
        xnor.pack(model, example=np.ones((2, 5)))
    model.runs[1].norm.var[...] = jnp.full(8, jnp.inf)
    with pytest.raises(ValueError, match="got NaN or inf at runs/1/norm/var"):
        xnor.pack(model)
    model.runs[1].norm.var[...] = jnp.full(8, -1.0)
    with pytest.raises(ValueError, match="runs/1/norm/var contains NaN"):
        xnor.pack(model)


def test_nan_in_a_closure_is_refused():
    """NaN is found after integers and scalars, which are not checked."""
    order, kernel = jnp.array([1, 0, 2]), jnp.full((3, 2), jnp.nan)
    scale = jnp.array(2.0)
    with pytest.raises(ValueError, match=r"got NaN or inf at closure/\d"):
        xnor.pack(lambda x: scale * x[:, order] @ kernel, example=np.ones((2, 3)))


def test_products_before_the_first_layer_count_in_its_row():
    first, second = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0)), [(16, 32), (32, 5)], strict=True
        )
    )

    def network(x):
        products = jnp.einsum("nqc, nkc -> nqk", x, x)
        signs = xnor.sign(products.reshape(len(x), -1) @ first)
        return signs @ xnor.binarize(second)

    real, binary = xnor.pack(network, example=np.ones((2, 4, 3))).report.rows
    assert (real.real_macs, real.binary_macs) == (4 * 4 * 3 + 16 * 32, 0)
    assert (binary.real_macs, binary.binary_macs) == (0, 32 * 5)


@pytest.mark.slow
def test_layer_subclasses_pack_what_they_compute():
    class Doubled(nnx.Conv):
        def __call__(self, inputs, out_sharding=None):
            return 2 * super().__call__(inputs, out_sharding)

    class Reversed(xnor.nn.BinaryConv):
        def __call__(self, x):
            return super().__call__(x[..., ::-1])

    model = Net(
        (6, 6, 4),
        Doubled(4, 9, (1, 1), rngs=nnx.Rngs(0)),
        Reversed(9, 5, (3, 3), rngs=nnx.Rngs(1)),
    )
    x = packed_networks.images(5, 6, 6, 4)
    packed = xnor.pack(packed_networks.randomized(model), backend="xla")
    np.testing.assert_allclose(packed(x), model(x), rtol=1e-4, atol=1e-4)
