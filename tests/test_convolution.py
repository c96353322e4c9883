import os
import subprocess
import sys
from functools import partial
from itertools import product
from math import prod
from typing import Any, NamedTuple

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from jax import lax

from xnor_jax import convolution
from xnor_jax import geometry as windows
from xnor_jax.nn import GlobalAveragePool


class Geometry(NamedTuple):
    """A convolution's shapes; `channels` counts all groups."""

    spatial: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: loop.Pads
    groups: int = 1
    channels: int = 3
    features: int = 5
    batch: int = 2

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        image = (self.batch, *self.spatial, self.channels)
        return image, (*self.window, self.channels // self.groups, self.features)

    def conv(self, x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
        return convolution.conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.pads,
            dilation=self.dilation,
            groups=self.groups,
            **options,
        )

    @property
    def loop_arguments(self):
        return self.strides, self.pads, self.dilation, self.groups


def lax_conv(geometry: Geometry, x: jax.Array, kernel: jax.Array) -> jax.Array:
    letters = "DHW"[-len(geometry.window) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.dilation,
        feature_group_count=geometry.groups,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )


def draw_arrays(geometry: Geometry, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in geometry.shapes]


def value_and_gradients(conv, x, kernel, g):
    """Return `y` and the pullback of `g` to both arguments, from one program."""

    @jax.jit
    def run(x, kernel, g):
        y, pullback = jax.vjp(conv, x, kernel)
        return y, *pullback(g.astype(y.dtype))

    return run(x, kernel, g)


def on_xla(conv, *shapes: tuple[int, ...]) -> bool:
    """Whether the program for this platform contains XLA's convolution."""
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    # Compiled: lowered text still has the branches of other platforms.
    return "convolution(" in jax.jit(conv).lower(*args).compile().as_text()


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_gpu_lowers_unstrided_1x1_convolution_to_dot(strides):
    """XLA's GPU compiler in JAX 0.10 fails if the strides are slices."""
    pads, unit = ((0, 0),) * 2, (1, 1)
    conv = partial(convolution.conv, strides=strides, padding=pads, dilation=unit)

    def value_and_pullback(x, kernel):
        y, pullback = jax.vjp(conv, x, kernel)
        return y, pullback(y)

    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 6, 6, 4), (1, 1, 4, 5))]
    text = (
        jax.jit(value_and_pullback)
        .trace(*args)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    counts = [
        text.count(f"stablehlo.{kind}") for kind in ("dot_general", "convolution")
    ]
    assert counts == ([3, 0] if strides == unit else [0, 3])


# Odd sizes, a stride and a dilation that differ by axis, padding that differs by side.
GEOMETRIES = {
    "rank 1": Geometry((9,), (4,), (2,), (2,), ((3, 1),)),
    "rank 2": Geometry((7, 9), (3, 2), (2, 1), (1, 3), ((0, 2), (1, 0))),
    "rank 3": Geometry((4, 3, 5), (2, 3, 2), (1, 2, 3), (2, 1, 1), ((1, 0),) * 3),
    "groups": Geometry(
        (5, 4), (3, 2), (2, 1), (1, 2), ((1, 1), (0, 1)), 3, channels=6, features=9
    ),
    "1×1": Geometry((5, 6), (1, 1), (2, 3), (1, 1), ((0, 0),) * 2),
    "1×1 padded": Geometry((4, 3), (1, 1), (1, 2), (1, 1), ((1, 0), (0, 2))),
    "largest patch": Geometry((6, 5), (4, 4), (1, 1), (1, 1), ((1, 0),) * 2, 1, 32),
    "XLA": Geometry((6, 5), (4, 4), (1, 1), (1, 1), ((1, 0),) * 2, 1, 33),
    "image of the window's size": Geometry(
        (3, 4), (3, 4), (1, 2), (1, 1), ((0, 0),) * 2
    ),
}
geometries = pytest.mark.parametrize(
    "geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys()
)


@geometries
def test_conv_and_gradients_match_loops_and_lax(geometry: Geometry):
    x, kernel = draw_arrays(geometry)
    y = loop.conv(x, kernel, *geometry.loop_arguments)
    g = np.random.default_rng(1).normal(size=y.shape)
    oracle = (y, *loop.conv_gradients(x, kernel, g, *geometry.loop_arguments))
    args = [jnp.asarray(value, jnp.float32) for value in (x, kernel, g)]

    ours = value_and_gradients(geometry.conv, *args)
    by_lax = value_and_gradients(partial(lax_conv, geometry), *args)

    chex.assert_trees_all_close(ours, oracle, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(ours, by_lax, rtol=1e-4, atol=1e-4)
    chex.assert_type(ours, jnp.float32)


@pytest.mark.slow
def test_gradients_of_groups_are_right_on_a_mesh_of_two_axes():
    # XLA's own kernel gradient is twice as large if one axis alone shards the batch.
    program = """if True:
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from xnor_jax.convolution import conv

        rng = np.random.default_rng(0)
        x, kernel = (
            rng.normal(size=s).astype("f") for s in ((4, 5, 5, 6), (3, 3, 3, 10))
        )
        options = {"strides": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1)}
        loss = lambda *args: (conv(*args, groups=2, **options) ** 2).sum()
        gradients = jax.jit(jax.grad(loss, (0, 1)))
        mesh = jax.make_mesh((2, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
        split, whole = (NamedSharding(mesh, P(*axes)) for axes in (["x"], []))
        found = gradients(jax.device_put(x, split), jax.device_put(kernel, whole))
        for a, b in zip(found, gradients(x, kernel)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
    """
    flags = "--xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@st.composite
def any_geometry(draw) -> Geometry:
    rank = draw(st.integers(1, 3))

    def per_axis(values):
        return draw(st.tuples(*[values] * rank))

    small = st.integers(1, 3)
    groups = draw(small)
    window, dilation = per_axis(small), per_axis(st.integers(1, 2))
    extents = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    pads = per_axis(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    spatial = tuple(n + draw(st.integers(0, 3)) for n in extents)
    return Geometry(
        spatial=spatial,
        window=window,
        strides=per_axis(small),
        dilation=dilation,
        pads=pads,
        groups=groups,
        channels=groups * draw(small),
        features=groups * draw(small),
        batch=draw(small),
    )


@hypothesis.given(any_geometry(), st.integers(0, 99))
def test_conv_matches_loops_for_any_geometry(geometry: Geometry, seed: int):
    x, kernel = draw_arrays(geometry, seed)
    y = geometry.conv(jnp.float32(x), jnp.float32(kernel))
    expected = loop.conv(x, kernel, *geometry.loop_arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_conv_selects_the_fast_cpu_formulation():
    if jax.default_backend() != "cpu":
        pytest.skip("the decision is about CPUs")
    assert prod(GEOMETRIES["largest patch"].shapes[1][:-1]) == 512
    uses_xla = {
        name: on_xla(GEOMETRIES[name].conv, *GEOMETRIES[name].shapes)
        for name in ("rank 2", "1×1", "largest patch", "XLA", "groups")
    }
    assert uses_xla == {
        "rank 2": False,
        "1×1": False,
        "largest patch": False,
        "XLA": True,
        "groups": True,
    }


SIGN_GEOMETRIES = {
    "patches": Geometry((5, 5), (3, 3), (1, 1), (1, 1), ((1, 0),) * 2, 1, 55, 3),
    "XLA": Geometry((5, 5), (3, 3), (1, 1), (1, 1), ((1, 0),) * 2, 1, 67, 3),
    "1×1": Geometry((3, 3), (1, 1), (1, 1), (1, 1), ((0, 0),) * 2, 1, 601, 3),
    "groups": Geometry((5, 5), (3, 3), (1, 1), (1, 1), ((1, 0),) * 2, 2, 134, 4),
}


@pytest.mark.parametrize("name", SIGN_GEOMETRIES)
def test_sums_of_half_precision_signs_are_exact_integers(name: str):
    geometry = SIGN_GEOMETRIES[name]
    rng = np.random.default_rng(0)
    # Mostly +1, so that sums exceed 256, beyond which bfloat16 skips odd integers.
    x, kernel = (rng.choice([-1, 1], p=[0.1, 0.9], size=s) for s in geometry.shapes)
    expected = loop.conv(x, kernel, *geometry.loop_arguments)
    assert ((expected > 256) & (expected % 2 == 1)).any()
    y = geometry.conv(
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(kernel, jnp.bfloat16),
        accumulator=jnp.float32,
    )
    chex.assert_type(y, jnp.float32)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("name", SIGN_GEOMETRIES)
def test_half_precision_gradients_keep_dtype_and_value(name: str):
    geometry = SIGN_GEOMETRIES[name]
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in draw_arrays(geometry))
    shape = jax.eval_shape(geometry.conv, x, kernel).shape
    g = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.bfloat16)

    y, *gradients = jax.eval_shape(
        partial(value_and_gradients, geometry.conv), x, kernel, g
    )
    assert {leaf.dtype for leaf in (y, *gradients)} == {jnp.dtype(jnp.bfloat16)}

    conv = partial(geometry.conv, accumulator=jnp.float32)
    y, *gradients = value_and_gradients(conv, x, kernel, g)
    chex.assert_type(y, jnp.float32)
    chex.assert_type(gradients, jnp.bfloat16)
    exact = [np.asarray(a, np.float64) for a in (x, kernel, g)]
    expected = loop.conv_gradients(*exact, *geometry.loop_arguments)
    for ours, oracle in zip(gradients, expected, strict=True):
        error = np.abs(np.asarray(ours, np.float64) - oracle)
        assert error.max() < 2e-2 * np.abs(oracle).max()


def test_conv_supports_vmap_over_kernels():
    geometry = GEOMETRIES["rank 2"]
    x, kernel = (jnp.float32(a) for a in draw_arrays(geometry))
    kernels = jnp.stack([kernel, -2 * kernel[::-1], kernel[..., ::-1]])
    batched = jax.vmap(geometry.conv, in_axes=(None, 0))(x, kernels)
    looped = jnp.stack([geometry.conv(x, k) for k in kernels])
    np.testing.assert_allclose(batched, looped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [2, 58])  # Patches; XLA's convolution.
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_an_image_smaller_than_the_window_is_refused(channels, strides):
    unit = (1, 1)
    geometry = Geometry((2, 2), (3, 3), strides, unit, ((0, 0),) * 2, 1, channels)
    x, kernel = (jnp.float32(np.ones(shape)) for shape in geometry.shapes)
    with pytest.raises(
        ValueError, match=r"conv: expected a window that fits.*\(2, 2\)"
    ):
        geometry.conv(x, kernel)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_dot_matches_numpy(shape):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=shape), rng.normal(size=(7, 5))
    y = convolution.dot(jnp.float32(x), jnp.float32(kernel))
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-5)


def test_dot_uses_the_given_accumulator():
    ones = jnp.ones((1, 601), jnp.bfloat16)
    y = convolution.dot(ones, ones.T, accumulator=jnp.float32)
    chex.assert_type(y, jnp.float32)
    assert y == 601


POOLS = {
    "rank 1": ((2, 9, 3), (3,), (2,), ((1, 1),)),
    "2/2": ((2, 7, 6, 3), (2, 2), (2, 2), ((0, 0), (0, 0))),
    "3/2 pad 1": ((2, 8, 7, 3), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "overlapping, uneven": ((2, 8, 7, 3), (4, 2), (1, 3), ((2, 0), (0, 1))),
    "rank 3": ((1, 4, 5, 6, 2), (2, 3, 1), (2, 1, 2), ((0, 1), (1, 0), (0, 0))),
}


def pool_windows(shape, window, strides, pads):
    return windows.pool_geometry(
        "pool", shape[1:-1], window, strides=strides, padding=pads
    )


@partial(jax.jit, static_argnums=0)
def pool_and_gradient(pool, x, g):
    y, pullback = jax.vjp(pool, x)
    return y, pullback(g)[0]


@pytest.mark.parametrize("name", POOLS)
def test_max_pool_and_gradient_match_reduce_window(name: str):
    shape, window, strides, pads = POOLS[name]
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=shape)) - 3  # Below 0: zero padding would show.
    assert len(np.unique(x)) == x.size, "equal maxima share the gradient otherwise"

    def by_lax(x):
        padding = ((0, 0), *pads, (0, 0))
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), padding
        )

    ours = partial(
        convolution.max_pool, geometry=pool_windows(shape, window, strides, pads)
    )
    g = jnp.float32(rng.normal(size=jax.eval_shape(ours, x).shape))
    y, d_x = pool_and_gradient(ours, x, g)
    expected, expected_d_x = pool_and_gradient(by_lax, x, g)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(d_x, expected_d_x, rtol=1e-6, atol=1e-6)
    if len(window) == 2 and window[0] == window[1]:
        plain = loop.max_pool(np.asarray(x), window[0], strides[0], pads)
        np.testing.assert_array_equal(y, plain)


def test_tied_maxima_share_the_gradient():
    x = jnp.float32(np.random.default_rng(0).integers(0, 2, size=(2, 6, 6, 3)))

    geometry = pool_windows(x.shape, (3, 3), (3, 3), "VALID")

    def total(x):
        return convolution.max_pool(x, geometry).sum()

    shares = jax.jit(jax.grad(total))(x)
    by_window = np.asarray(shares).reshape(2, 2, 3, 2, 3, 3).sum((2, 4))
    np.testing.assert_allclose(by_window, np.ones_like(by_window), rtol=1e-6)
    assert (np.asarray(shares)[np.asarray(x) == 0] == 0).all()


def sequential_window_sums(x: np.ndarray, geometry: windows.Geometry) -> np.ndarray:
    """Sums in the order of a loop over the window, in the dtype of `x`."""
    padded = np.pad(x, ((0, 0), *geometry.padding, (0, 0)))
    sums = np.zeros((len(x), *geometry.out, x.shape[-1]), x.dtype)
    for tap in product(*map(range, geometry.window)):
        slices = [
            slice(t * d, t * d + (out - 1) * s + 1, s)
            for t, d, out, s in zip(
                tap, geometry.dilation, geometry.out, geometry.strides, strict=True
            )
        ]
        sums += padded[(slice(None), *slices)]
    return sums


@pytest.mark.parametrize(
    "longest_chain",
    [
        pytest.param(0, id="a loop", marks=pytest.mark.slow),
        pytest.param(256, id="a chain", marks=pytest.mark.slow),
    ],
)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(any_geometry(), st.integers(0, 99))
def test_sum_pool_has_a_fixed_summation_order(longest_chain, monkeypatch, case, seed):
    monkeypatch.setattr(convolution, "_LONGEST_CHAIN", longest_chain)
    geometry = windows.conv_geometry(
        "pool",
        case.spatial,
        case.window,
        strides=case.strides,
        padding=case.pads,
        dilation=case.dilation,
    )
    rng = np.random.default_rng(seed)
    integers = rng.integers(-99, 99, (case.batch, *case.spatial, 5)).astype(np.float32)
    scale = np.float32(rng.normal(size=5) * 10.0 ** rng.integers(-3, 3, 5))
    expected = sequential_window_sums(scale * integers, geometry)

    # XLA could fuse the product with the additions and round once.
    @jax.jit
    def sums(integers, scale):
        return convolution.sum_pool(scale * integers, geometry)

    np.testing.assert_array_equal(sums(integers, scale), expected)
    single = np.concatenate([sums(image[None], scale) for image in integers])
    np.testing.assert_array_equal(single, expected)

    def by_lax(x):
        return lax.reduce_window(
            x,
            np.float32(0),
            lax.add,
            (1, *geometry.window, 1),
            (1, *geometry.strides, 1),
            ((0, 0), *geometry.padding, (0, 0)),
            window_dilation=(1, *geometry.dilation, 1),
        )

    ours = partial(convolution.sum_pool, geometry=geometry)
    g, x_dot = (
        jnp.float32(rng.normal(size=s)) for s in (expected.shape, integers.shape)
    )
    _, d_x = pool_and_gradient(ours, integers, g)
    np.testing.assert_array_equal(d_x, pool_and_gradient(by_lax, integers, g)[1])
    tangents = jax.jvp(ours, (integers,), (x_dot,))[1]
    np.testing.assert_allclose(tangents, by_lax(x_dot), rtol=1e-5, atol=1e-5)


def test_global_average_pool_and_its_gradient():
    x = np.float32(np.random.default_rng(0).normal(size=(3, 5, 7, 6)))
    layer = GlobalAveragePool()
    np.testing.assert_allclose(layer(x), x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    g = np.float32(np.random.default_rng(1).normal(size=(3, 6)))
    _, d_x = pool_and_gradient(layer, x, g)
    share = np.float32(g / np.float32(35))[:, None, None]
    np.testing.assert_allclose(d_x, np.broadcast_to(share, x.shape), rtol=1e-6)
    half = layer(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    exact = np.float32(jnp.asarray(x, jnp.bfloat16)).mean((1, 2))
    np.testing.assert_allclose(np.float32(half), exact, rtol=2**-8, atol=2**-10)
