"""Products with gradients: the compiled ones compared with XLA's floats."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import xnor_jax as xnor
from xnor_jax.geometry import DENSE, Geometry
from xnor_jax.ops import cpu, gradients, training

needs_library = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)


@st.composite
def cases(draw, ranks=(0, 1, 2)):
    """Draw a geometry, images, a kernel, optional bias and keep mask, a ReLU flag."""
    size = partial(st.integers, 1)
    rank = draw(st.sampled_from(ranks))
    geometry = DENSE
    if rank:
        axes = [
            (draw(size(5)), draw(size(3)), draw(size(2)), draw(st.integers(0, 9)))
            for _ in range(rank)
        ]
        window, strides, dilation, extra = zip(*axes, strict=True)
        pads = tuple((draw(st.integers(0, 5)), draw(st.integers(0, 5))) for _ in axes)
        span = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        spatial = tuple(
            max(1, r - sum(pad)) + n
            for r, pad, n in zip(span, pads, extra, strict=True)
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
    """Compare arrays to rounding, relative to the largest value of each."""

    def check(a, b):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=2e-5 * np.abs(b).max(initial=1)
        )

    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    jax.tree.map(check, ours, expected)


def unchanged(kernel, grad):
    """A rule that returns the gradient at `w̃`; it allows a single input channel."""
    return grad


def quadratic(x, grad):
    """A user-defined surrogate."""
    return grad * (1 + x**2)


@pytest.mark.slow
@needs_library
@given(
    cases(),
    st.sampled_from([unchanged, "exact"]),
    st.sampled_from(["ste", "identity", None, "approx", quadratic]),
)
def test_compiled_product_matches_floats(case, rule, surrogate):
    geometry, x, kernel, bias, keep, relu = case

    def run_on(backend):
        function = partial(
            training.binary_product,
            keep=keep,
            keep_rate=1 if keep is None else 0.75,
            geometry=geometry,
            relu=relu,
            rule=rule,
            surrogate=surrogate,
            backend=backend,
        )
        return result_and_gradients(function, x, kernel, bias)

    check_close(run_on("cpu"), run_on("float"))


@needs_library
def test_surrogates_save_the_expected_bits_per_value():
    """It keeps two bits per value, one bit, or also the value; results are equal."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(2, 9, 8, 64)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 64, 8)))
    geometry = Geometry((9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    bits_per_value, results = {}, []
    for surrogate in ("ste", "identity", None, "swish"):
        product = partial(
            training.binary_product,
            geometry=geometry,
            surrogate=surrogate,
            backend="cpu",
        )
        y, pull = jax.vjp(lambda x, product=product: product(x, kernel), x)
        leaves = [leaf for leaf in jax.tree.leaves(pull) if len(leaf.shape) == 4]
        pixels = [leaf for leaf in leaves if leaf.shape[:3] == x.shape[:3]]
        distinct = {id(leaf): leaf for leaf in pixels}.values()
        bits_per_value[surrogate] = 8 * sum(leaf.nbytes for leaf in distinct) / x.size
        results.append(y)
    assert bits_per_value == {"ste": 2, "identity": 1, None: 1, "swish": 33}
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


@pytest.mark.slow
@needs_library
@given(cases(ranks=(1, 2)))
def test_compiled_convolution_matches_xla(case):
    geometry, x, kernel, _, _, _ = case

    def run_on(backend):
        function = partial(training.conv, **geometry.options, backend=backend)
        return result_and_gradients(function, x, kernel)

    check_close(run_on("cpu"), run_on("float"))


@pytest.mark.slow
@needs_library
@given(cases(ranks=(1, 2)))
def test_both_image_gradients_match_xla(case):
    """Test both formulations, whichever one would be selected."""
    geometry, x, kernel, _, _, _ = case
    conv = partial(training.conv, **geometry.options, backend="float")
    y, pull = jax.vjp(lambda x: conv(x, kernel), x)
    g = jax.random.normal(jax.random.key(0), y.shape)
    for formulation in (gradients.col2im, gradients.transposed):
        check_close(jax.jit(partial(formulation, geometry))(g, kernel), pull(g)[0])


@pytest.mark.parametrize(
    "size, kernel, strides, padding, expected",
    [
        ((12, 12), (5, 5, 20, 50), 1, 0, True),  # LeNet-5: 20 channels, a partial panel
        ((16, 16), (5, 5, 96, 192), 1, 2, False),  # NIN
        ((56, 56), (3, 3, 64, 128), 2, 1, True),  # ResNet: zeros between strides
        ((56, 56), (1, 1, 64, 128), 2, 0, True),
        ((56, 56), (3, 3, 64, 64), 1, 1, False),
        ((128, 128), (9, 9, 3, 3), 1, 0, False),  # patches of 14 MB per image
    ],
)
def test_col2im_is_selected_by_geometry(size, kernel, strides, padding, expected):
    pads, unit = ((padding, padding),) * 2, (1, 1)
    geometry = Geometry(size, kernel[:2], (strides, strides), pads, unit)
    assert gradients.takes_col2im(geometry, jnp.zeros(kernel)) == expected


@needs_library
def test_products_match_floats_exactly():
    """Without a bias, and at a scale that is a power of two, nothing is rounded."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 9, 8, 37)).astype(np.float32)
    kernel = rng.choice([-0.5, 0.5], (5, 3, 37, 41)).astype(np.float32)
    geometry = Geometry((9, 8), (5, 3), (1, 2), ((2, 2), (1, 1)), (1, 1))
    keep = rng.random(x.shape) < 0.5
    for options in ({}, {"keep": keep, "keep_rate": 0.5}):
        product = partial(training.binary_product, geometry=geometry, **options)
        both = [partial(product, backend=name) for name in ("cpu", "float")]
        np.testing.assert_array_equal(*(jax.jit(f)(x, kernel) for f in both))


@needs_library
@pytest.mark.parametrize("name", cpu.instruction_sets())
@pytest.mark.parametrize("channels", [19, 90])  # 90: all threads share one sum
def test_kernel_gradient_on_every_instruction_set(name, channels):
    """Values are integers, so that sums are exact in any order."""
    rng = np.random.default_rng(0)
    geometry = Geometry((7, 40), (3, 5), (2, 1), ((1, 0), (2, 3)), (1, 2))
    x = jnp.float32(rng.integers(-8, 9, (3, 7, 40, channels)))
    g = jnp.float32(rng.integers(-8, 9, (3, *geometry.out, 45)))
    original = cpu.instruction_set()
    try:
        cpu.use_instruction_set(name)
        ours = cpu.kernel_gradient(x, x, g, (3, 5, channels, 45), geometry)
    finally:
        cpu.use_instruction_set(original)

    def product(kernel):
        return training.conv(x, kernel, **geometry.options, backend="float")

    pull = jax.jit(lambda g: jax.vjp(product, jnp.zeros(ours.shape))[1](g)[0])
    expected = pull(g)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@needs_library
def test_gradients_match_under_vmap_and_shard_map():
    """Mapped gradients equal those of a loop, and sharded ones those of one device."""
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(4, 2, 6, 6, 33)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 33, 8)))
    geometry = Geometry((6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))

    def loss(kernel, x):
        y = training.binary_product(
            x,
            kernel,
            geometry=geometry,
            rule=nonlinear,
            surrogate="tanh",
            backend="cpu",
        )
        return jnp.sum(jnp.sin(y))

    def nonlinear(kernel, grad):
        # Nonlinear: it needs the gradient summed over the devices.
        return grad * jnp.abs(grad) + kernel

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
        # The kernel is replicated: its gradient is summed over the devices.
        return gradient(kernel, x)

    flat = x.reshape(8, 6, 6, 33)
    check_close(sharded(kernel, flat), gradient(kernel, flat))


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize(
    "images, weights",
    [(P("i"), P()), (P(), P()), (P(None, "i"), P()), (P(None, None, None, "i"), P())]
    + [(P("i"), P(None, None, None, "i")), (P(), P(None, None, "i"))],
)
def test_sharded_arrays_match_one_device(images, weights):
    """Values and gradients equal one device's, however the arrays are sharded."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(4, 6, 6, 34)))
    kernel = jnp.float32(rng.normal(size=(3, 3, 34, 8)))
    real_kernel = jnp.float32(rng.normal(size=(5, 5, 8, 6)))
    geometry = Geometry((6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))

    @jax.jit
    def run(x, kernel):
        def loss(x, kernel):
            y = training.binary_product(x, kernel, geometry=geometry, backend="cpu")
            options = {"strides": (2, 2), "padding": ((2, 2),) * 2, "dilation": (1, 1)}
            return jnp.sum(
                jnp.sin(training.conv(y, real_kernel, **options, backend="cpu"))
            ), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)

    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    put = partial(NamedSharding, mesh)
    sharded = jax.device_put(x, put(images)), jax.device_put(kernel, put(weights))
    check_close(run(*sharded), run(x, kernel))
    if images == P("i"):
        # The images are not gathered: each call sees two of the four.
        calls = [
            line.partition("custom-call(")[0]
            for line in run.lower(*sharded).compile().as_text().splitlines()
            if 'custom_call_target="xnor_jax_run"' in line
        ]
        assert len(calls) >= 5 and all("[2," in line for line in calls)


def make_loss(options):
    def loss(kernel, x):
        y = training.conv(x, kernel, **options)
        geometry = Geometry(y.shape[1:-1], (3, 3), *options.values())
        z = training.binary_product(y, kernel, kernel[0, 0, 0], geometry=geometry)
        return jnp.sum(jnp.cos(z) * y)

    return loss


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("count", [3, 4, 5])
def test_indivisible_batches_match_one_device(count):
    """XLA would leave undefined values in the last shard, after the last image."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.float32(rng.normal(size=size)) for size in ((8, 6, 6, 8), (3, 3, 8, 8))
    )
    options = {"strides": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1)}
    loss = make_loss(options)

    @jax.jit
    def run(kernel, x):
        selected = jnp.concatenate([jnp.exp(x[:count]), x[:1]])
        return jax.value_and_grad(loss, argnums=(0, 1))(kernel, selected)

    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    split = jax.device_put(x, NamedSharding(mesh, P("i")))
    check_close(run(kernel, split), run(kernel, x))


@needs_library
@pytest.mark.parametrize("spec", [P(None, None, None, "i"), P(None, None, "i")])
@pytest.mark.parametrize("features", [4, pytest.param(64, marks=pytest.mark.slow), 96])
def test_sharded_kernels_match_one_device(features, spec):
    """96 channels are three panels of words, one of which two devices would share."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    layer = xnor.nn.BinaryConv(32, features, (3, 3), rngs=nnx.Rngs(0))
    x = jnp.float32(np.random.default_rng(0).normal(size=(4, 5, 5, 32)))
    graphdef, state = nnx.split(layer)

    @jax.jit
    @jax.value_and_grad
    def run(state, x):
        return jnp.sum(jnp.cos(nnx.merge(graphdef, state)(x)))

    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))
    kernel = jax.device_put(layer.kernel[...], NamedSharding(mesh, spec))
    layer.kernel[...] = kernel
    check_close(run(nnx.state(layer), x), run(state, x))
    sums = jax.jit(partial(xnor.ops.binary_conv, strides=1, padding=1))
    wanted = sums(x, state["kernel"][...])
    np.testing.assert_array_equal(sums(x, kernel), wanted)

    @jax.jit
    def packed_inside(x, kernel):
        packed, bits = xnor.ops.pack_kernel(kernel), xnor.ops.sign_bits(x)
        return xnor.ops.packed_conv(bits, packed, xnor.ops.Sums(), strides=1, padding=1)

    np.testing.assert_array_equal(packed_inside(x, kernel), wanted)


@pytest.mark.slow
@needs_library
def test_shard_map_over_some_mesh_axes_matches_one_device():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.float32(rng.normal(size=size)) for size in ((4, 6, 6, 8), (3, 3, 8, 8))
    )
    options = {"strides": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1)}
    gradient = jax.grad(make_loss(options))
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


@pytest.mark.slow
def test_other_dtypes_and_ranks_use_xla():
    rng = np.random.default_rng(0)
    for dtype, rank in ((jnp.bfloat16, 2), (jnp.float32, 3)):
        x = jnp.asarray(rng.normal(size=(2, *(4,) * rank, 5)), dtype)
        kernel = jnp.asarray(rng.normal(size=(*(3,) * rank, 5, 6)), dtype)
        geometry = Geometry(
            (4,) * rank, (3,) * rank, (1,) * rank, ((1, 1),) * rank, (1,) * rank
        )
        both = [
            training.binary_product(x, kernel, geometry=geometry, backend=backend)
            for backend in ("auto", "float")
        ]
        assert both[0].dtype == dtype
        np.testing.assert_array_equal(*both)


def test_layers_use_their_backend():
    x = jnp.ones((2, 6, 6, 4))

    def calls(backend):
        layer = xnor.nn.BinaryConv(4, 5, (3, 3), backend=backend, rngs=nnx.Rngs(0))
        text = jax.jit(layer).lower(x).as_text()
        return text.count("xnor_jax_run")

    assert calls("float") == 0
    assert (calls("auto") > 0) == cpu.is_available()
    with pytest.raises(ValueError, match="unknown backend 'none'"):
        calls("none")


def test_channels_of_input_and_kernel_match():
    kernel, x = jnp.ones((20, 4)), jnp.ones((2, 32))
    for backend in ("auto", "float"):
        with pytest.raises(ValueError, match="expected x of 20 channels"):
            training.binary_product(x, kernel, geometry=DENSE, backend=backend)
