"""Products with gradients: the compiled ones beside XLA's floats."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import xnor_jax as xnor
from xnor_jax.geometry import DENSE, Geometry
from xnor_jax.layers import real_conv
from xnor_jax.ops import cpu, gradients, training

needs_library = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)


@st.composite
def cases(draw, ranks=(0, 1, 2)):
    """A geometry, then images, a kernel, a bias or none, signs to keep or none."""
    size = partial(st.integers, 1)
    rank = draw(st.sampled_from(ranks))
    geometry = DENSE
    if rank:
        axes = [
            (draw(size(5)), draw(size(3)), draw(size(2)), draw(st.integers(0, 9)))
            for _ in range(rank)
        ]
        window, strides, dilation, more = zip(*axes, strict=True)
        pads = tuple((draw(st.integers(0, 5)), draw(st.integers(0, 5))) for _ in axes)
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        spatial = tuple(
            max(1, r - sum(pad)) + n
            for r, pad, n in zip(reach, pads, more, strict=True)
        )
        geometry = Geometry(spatial, window, strides, pads, dilation)
    channels, features = draw(size(70)), draw(size(70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(size(4)), *geometry.spatial, channels)
    x = rng.choice([-2, -1, -0.5, -0.0, 0, 0.25, 1, 3], shape).astype(np.float32)
    kernel = rng.normal(size=(*geometry.window, channels, features)).astype(np.float32)
    bias = rng.normal(size=features).astype(np.float32) if draw(st.booleans()) else None
    keep = rng.random(shape) < 0.75 if draw(st.booleans()) else None
    return geometry, x, kernel, bias, keep, draw(st.booleans())


def result_and_gradients(function, *args):
    @jax.jit
    def run(*args):
        y, pull = jax.vjp(function, *args)
        return y, pull(jax.random.normal(jax.random.key(0), y.shape, y.dtype))

    return run(*args)


def check_close(ours, expected):
    """Each array to rounding, against its largest number."""

    def check(a, b):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=2e-5 * np.abs(b).max(initial=1)
        )

    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    jax.tree.map(check, ours, expected)


@needs_library
@given(cases())
def test_product_of_signs_is_that_of_floats(case):
    geometry, x, kernel, bias, keep, relu = case
    kernel = np.asarray(xnor.binarize(kernel, rule="ste"))

    def on(backend):
        function = partial(
            training.binary_product,
            keep=keep,
            keep_rate=1 if keep is None else 0.75,
            geometry=geometry,
            relu=relu,
            backend=backend,
        )
        return result_and_gradients(function, x, kernel, bias)

    check_close(on("cpu"), on("float"))


@needs_library
@given(cases(ranks=(1, 2)))
def test_convolution_of_floats_is_xlas(case):
    geometry, x, kernel, _, _, _ = case

    def on(backend):
        function = partial(training.conv, **geometry.options, backend=backend)
        return result_and_gradients(function, x, kernel)

    check_close(on("cpu"), on("float"))


@needs_library
@given(cases(ranks=(1, 2)))
def test_gradient_of_the_images_either_way(case):
    """Whichever is to be the quicker one."""
    geometry, x, kernel, _, _, _ = case
    conv = partial(training.conv, **geometry.options, backend="float")
    y, pull = jax.vjp(lambda x: conv(x, kernel), x)
    g = jax.random.normal(jax.random.key(0), y.shape)
    for way in (gradients.folded, gradients.transposed):
        check_close(jax.jit(partial(way, geometry))(g, kernel), pull(g)[0])


@pytest.mark.parametrize(
    "size, kernel, strides, padding, folded",
    [
        ((12, 12), (5, 5, 20, 50), 1, 0, True),  # LeNet-5: 20 channels fill no panel
        ((16, 16), (5, 5, 96, 192), 1, 2, False),  # NIN
        ((56, 56), (3, 3, 64, 128), 2, 1, True),  # ResNet: zeros between strides
        ((56, 56), (1, 1, 64, 128), 2, 0, True),
        ((56, 56), (3, 3, 64, 64), 1, 1, False),
        ((128, 128), (9, 9, 3, 3), 1, 0, False),  # patches of 14 MB an image
    ],
)
def test_what_folds(size, kernel, strides, padding, folded):
    pads, unit = ((padding, padding),) * 2, (1, 1)
    geometry = Geometry(size, kernel[:2], (strides, strides), pads, unit)
    assert gradients.folds(geometry, jnp.zeros(kernel)) == folded


@needs_library
def test_sums_are_the_same_integers():
    """Without a bias, and at a scale that is a power of two, nothing is rounded."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 8, 37)).astype(np.float32)
    kernel = rng.choice([-0.5, 0.5], (5, 3, 37, 41)).astype(np.float32)
    way = Geometry((9, 8), (5, 3), (1, 2), ((2, 2), (1, 1)), (1, 1))
    keep = rng.random(x.shape) < 0.5
    for options in ({}, {"keep": keep, "keep_rate": 0.5}):
        product = partial(training.binary_product, geometry=way, **options)
        both = [partial(product, backend=name) for name in ("cpu", "float")]
        np.testing.assert_array_equal(*(jax.jit(f)(x, kernel) for f in both))


@needs_library
@pytest.mark.parametrize("name", cpu.instruction_sets())
@pytest.mark.parametrize("channels", [19, 90])  # 90: one sum that all threads share
def test_gradient_of_the_kernel_on_every_instruction_set(name, channels):
    """Whole numbers: their sums are exact in any order."""
    rng = np.random.default_rng(0)
    geometry = Geometry((7, 40), (3, 5), (2, 1), ((1, 0), (2, 3)), (1, 2))
    way = geometry.options
    x = jnp.float32(rng.integers(-8, 9, (3, 7, 40, channels)))
    g = jnp.float32(rng.integers(-8, 9, (3, *geometry.out, 45)))
    chosen = cpu.instruction_set()
    try:
        cpu.use_instruction_set(name)
        ours = cpu.kernel_gradient(x, x, g, (3, 5, channels, 45), **way)
    finally:
        cpu.use_instruction_set(chosen)

    def product(kernel):
        return training.conv(x, kernel, **way, backend="float")

    pull = jax.jit(lambda g: jax.vjp(product, jnp.zeros(ours.shape))[1](g)[0])
    expected = pull(g)
    np.testing.assert_array_equal(ours, expected)


@needs_library
def test_under_vmap_and_shard_map():
    """Mapped gradients are those of one after another, and of all devices together."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(4, 2, 6, 6, 33)))
    kernel = xnor.binarize(jnp.float32(rng.normal(size=(3, 3, 33, 8))))
    way = Geometry((6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))

    def loss(kernel, x):
        y = training.binary_product(x, kernel, geometry=way, backend="cpu")
        return jnp.sum(jnp.sin(y))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    each = jax.tree.map(
        lambda *a: jnp.stack(a), *(gradient(kernel, image) for image in x)
    )
    check_close(jax.vmap(gradient, (None, 0))(kernel, x), each)
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("i")), out_specs=(P(), P("i")))
    def sharded(kernel, x):
        # The kernel is the same everywhere: its gradient is summed over the devices.
        return gradient(kernel, x)

    whole = x.reshape(8, 6, 6, 33)
    check_close(sharded(kernel, whole), gradient(kernel, whole))


@needs_library
@pytest.mark.parametrize(
    "images, weights",
    [(P("i"), P()), (P(), P()), (P(None, "i"), P()), (P(None, None, None, "i"), P())]
    + [(P("i"), P(None, None, None, "i")), (P(), P(None, None, "i"))],
)
def test_in_a_program_for_two_devices(images, weights):
    """However the arrays are split: values and gradients are those of one device."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(4, 6, 6, 34)))
    kernel = xnor.binarize(jnp.float32(rng.normal(size=(3, 3, 34, 8))))
    floats = jnp.float32(rng.normal(size=(5, 5, 8, 6)))
    way = Geometry((6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))

    @jax.jit
    def run(x, kernel):
        def loss(x, kernel):
            y = training.binary_product(x, kernel, geometry=way, backend="cpu")
            way2 = {"strides": (2, 2), "padding": ((2, 2),) * 2, "dilation": (1, 1)}
            return jnp.sum(jnp.sin(training.conv(y, floats, **way2, backend="cpu"))), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    put = partial(NamedSharding, mesh)
    given = jax.device_put(x, put(images)), jax.device_put(kernel, put(weights))
    check_close(run(*given), run(x, kernel))
    if images == P("i"):
        # Nobody gathers images: calls see two of the four.
        calls = [
            line.partition("custom-call(")[0]
            for line in run.lower(*given).compile().as_text().splitlines()
            if 'custom_call_target="xnor_jax_run"' in line
        ]
        assert len(calls) >= 5 and all("[2," in line for line in calls)


def loss_of(way):
    def loss(kernel, x):
        y = training.conv(x, kernel, **way)
        geometry = Geometry(y.shape[1:-1], (3, 3), *way.values())
        z = training.binary_product(y, kernel, kernel[0, 0, 0], geometry=geometry)
        return jnp.sum(jnp.cos(z) * y)

    return loss


@needs_library
@pytest.mark.parametrize("count", [3, 4, 5])
def test_images_that_do_not_divide_are_whole_on_each_device(count):
    """XLA's last share would hold anything behind the last image."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.float32(rng.normal(size=size)) for size in ((8, 6, 6, 8), (3, 3, 8, 8))
    )
    way = {"strides": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1)}
    loss = loss_of(way)

    @jax.jit
    def run(kernel, x):
        some = jnp.concatenate([jnp.exp(x[:count]), x[:1]])
        return jax.value_and_grad(loss, argnums=(0, 1))(kernel, some)

    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    split = jax.device_put(x, NamedSharding(mesh, P("i")))
    check_close(run(kernel, split), run(kernel, x))


@needs_library
def test_in_a_shard_map_over_some_axes_of_a_mesh():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.float32(rng.normal(size=size)) for size in ((4, 6, 6, 8), (3, 3, 8, 8))
    )
    way = {"strides": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1)}
    gradient = jax.grad(loss_of(way))
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("a", "b"))

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("a")),
        out_specs=P(),
        axis_names={"a"},
    )
    def sharded(kernel, x):
        return gradient(kernel, x)

    check_close(sharded(kernel, x), gradient(kernel, x))


def test_other_dtypes_and_ranks_are_xlas():
    rng = np.random.default_rng(0)
    for dtype, rank in ((jnp.bfloat16, 2), (jnp.float32, 3)):
        x = jnp.asarray(rng.normal(size=(2, *(4,) * rank, 5)), dtype)
        kernel = jnp.asarray(rng.normal(size=(*(3,) * rank, 5, 6)), dtype)
        way = Geometry(
            (4,) * rank, (3,) * rank, (1,) * rank, ((1, 1),) * rank, (1,) * rank
        )
        both = [
            training.binary_product(x, kernel, geometry=way, backend=backend)
            for backend in ("auto", "float")
        ]
        assert both[0].dtype == dtype
        np.testing.assert_array_equal(*both)


def test_layers_take_the_backend_they_are_given():
    x = jnp.ones((2, 6, 6, 4))

    def calls(backend):
        layer = xnor.nn.BinaryConv(4, 5, (3, 3), backend=backend, rngs=nnx.Rngs(0))
        text = jax.jit(layer).lower(x).as_text()
        return text.count("xnor_jax_run")

    assert calls("float") == 0
    assert (calls("auto") > 0) == cpu.is_available()
    with pytest.raises(ValueError, match="expected a backend out of 'auto'"):
        calls("none")


def numpy_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key  # Its own draw spares a compilation a shape.
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


ADAPTED: dict[str, dict[str, Any]] = {
    "same": {"kernel_size": (3, 2), "padding": "SAME", "strides": 2},
    "valid": {"kernel_size": (3, 3), "padding": "VALID", "kernel_dilation": (1, 2)},
    "number": {"kernel_size": (5, 5), "padding": 2},
    "pairs": {"kernel_size": (3, 3), "padding": ((0, 2), (1, 0)), "strides": (2, 1)},
    "groups": {"kernel_size": (3, 3), "feature_group_count": 2},
    "1×1": {"kernel_size": (1, 1), "strides": (1, 2)},
    "circular": {"kernel_size": (3, 3), "padding": "CIRCULAR"},
    "causal": {"kernel_size": 3, "padding": "CAUSAL"},
    "wide": {"kernel_size": (5, 5), "in_features": 22, "padding": 1},
    "accumulator": {
        "kernel_size": (3, 3),
        "dtype": jnp.bfloat16,
        "preferred_element_type": jnp.float32,
    },
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapter_in_an_nnx_conv_changes_nothing(name: str):
    options = {"in_features": 4, "out_features": 6, **ADAPTED[name]}
    rank = 1 if options["kernel_size"] == 3 else 2
    options["kernel_init"] = numpy_normal
    plain = nnx.Conv(**options, rngs=nnx.Rngs(0))
    adapted = nnx.Conv(
        **options,
        conv_general_dilated=training.conv_general_dilated,
        rngs=nnx.Rngs(0),
    )
    shape = (3, 7, 8)[: rank + 1]
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(*shape, options["in_features"])))
    y, expected = adapted(x), plain(x)
    chex.assert_trees_all_equal_shapes_and_dtypes(y, expected)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ADAPTED if name != "accumulator"])
@pytest.mark.parametrize("backend", ["auto", "float"])
def test_a_real_layer_with_its_bias_is_flaxs(name: str, backend: str):
    options = {"in_features": 4, "out_features": 6, **ADAPTED[name]}
    rank = 1 if options["kernel_size"] == 3 else 2
    ours = partial(training.conv_general_dilated, backend=backend)
    layers = [
        nnx.Conv(**options, **way, bias_init=numpy_normal, rngs=nnx.Rngs(0))
        for way in ({}, {"conv_general_dilated": ours})
    ]
    rng = np.random.default_rng(0)
    x = jnp.float32(
        rng.normal(size=(3, 7, 8, 9)[: rank + 1] + (layers[0].in_features,))
    )

    def run(layer, x):
        graph, state = nnx.split(layer, nnx.Param)

        def of(state, x):
            return real_conv(nnx.merge(graph, state), x)

        y, pull = jax.vjp(of, state, x)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    expected, found = (run(layer, x) for layer in layers)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)


@needs_library
def test_a_real_layers_bias_is_no_operation_of_its_own():
    layer = nnx.Conv(
        3,
        8,
        (3, 3),
        conv_general_dilated=training.conv_general_dilated,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    run = jax.jit(lambda state, x: real_conv(nnx.merge(graph, state), x))
    text = run.lower(state, jnp.ones((2, 6, 6, 3))).as_text()
    assert "xnor_jax_run" in text and "stablehlo.add" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dilation": 2}, r"conv: expected no input dilation, got \(2, 2\)"),
        ({"precision": lax.Precision.HIGHEST}, "conv: precision is not supported"),
    ],
)
def test_adapter_refuses_what_conv_cannot_do(options, message):
    layer = nnx.Conv(
        2,
        3,
        (3, 3),
        conv_general_dilated=training.conv_general_dilated,
        kernel_init=numpy_normal,
        **options,
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((1, 5, 5, 2)))


def test_adapter_refuses_channels_first():
    x, kernel = jnp.ones((1, 5, 5, 5)), jnp.ones((3, 3, 5, 4))
    with pytest.raises(ValueError, match="dimension_numbers"):
        training.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
        )
