"""Products of signs in bfloat16, compared with float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import xnor_jax as xnor
from xnor_jax import convolution
from xnor_jax.geometry import DENSE, Geometry
from xnor_jax.ops import cpu, scaled, training

BACKENDS = ("float", "cpu") if cpu.is_available() else ("float",)
SQUARE = Geometry((9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
# Images, window, stride, padding and dilation of each axis; groups.
CASES = {
    "dense": (DENSE, 1),
    "1×1": (Geometry((4, 5), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)), 1),
    "1×1, strided": (Geometry((7, 6), (1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1)), 1),
    "3×3": (SQUARE, 1),
    "uneven": (Geometry((9, 8), (3, 2), (2, 3), ((2, 0), (1, 3)), (1, 2)), 1),
    "groups": (Geometry((6, 7), (3, 3), (2, 1), ((1, 1), (0, 1)), (1, 1)), 3),
    "1-D": (Geometry((11,), (4,), (3,), ((1, 2),), (2,)), 3),
    "3-D": (Geometry((4, 3, 5), (2, 3, 1), (1, 1, 2), ((1, 0),) * 3, (1, 1, 1)), 1),
}


def draw(geometry, groups, channels=12, features=9, batch=3):
    rng = np.random.default_rng(0)
    shape = (*geometry.window, channels // groups, features)
    x = rng.normal(size=(batch, *geometry.spatial, channels)).astype(np.float32)
    return jnp.asarray(x), jnp.float32(rng.normal(size=shape))


def unchanged(kernel, grad):
    """A rule that returns the gradient at `w̃`."""
    return grad


def real_product(geometry, groups, x, kernel):
    if geometry == DENSE:
        return x @ kernel
    options = {n: getattr(geometry, n) for n in ("strides", "padding", "dilation")}
    return convolution.xla_conv(x, kernel, **options, groups=groups)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8)
@given(
    channels=st.integers(1, 70),
    features=st.integers(1, 40),
    window=st.integers(1, 4),
    keep_rate=st.sampled_from([1.0, 0.7]),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_results_equal_float32_exactly(
    backend, channels, features, window, keep_rate, relu, seed
):
    rng = np.random.default_rng(seed)
    x = jnp.float32(rng.normal(size=(2, 5, 6, channels)))
    # A scale that is not exact in bfloat16.
    kernel = rng.choice([-0.3, 0.3], (window, window, channels, features))
    geometry = Geometry((5, 6), (window,) * 2, (2, 1), ((1, 1),) * 2, (1, 1))
    product = partial(
        training.binary_product,
        x,
        jnp.float32(kernel),
        keep=None if keep_rate == 1 else jnp.asarray(rng.random(x.shape) < keep_rate),
        keep_rate=keep_rate,
        geometry=geometry,
        relu=relu,
        rule=unchanged,
        backend=backend,
    )
    y = jax.jit(partial(product, compute_dtype=jnp.bfloat16))()
    expected = jax.jit(product)()
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, name)
        for backend in BACKENDS
        for name, (geometry, groups) in CASES.items()
        # The library supports no others.
        if backend == "float" or (groups == 1 and len(geometry.window) < 3)
    ],
)
def test_gradients_match_the_float64_formula(backend, name):
    """Compare with the float64 formula for a gradient rounded to bfloat16."""
    geometry, groups = CASES[name]
    x, kernel = draw(geometry, groups)
    keep_rate = 1.0 if name == "dense" else 0.7
    rng = np.random.default_rng(1)
    keep = None if keep_rate == 1 else jnp.asarray(rng.random(x.shape) < keep_rate)

    def product(x, kernel):
        return training.binary_product(
            x,
            kernel,
            keep=keep,
            keep_rate=keep_rate,
            geometry=geometry,
            groups=groups,
            rule=unchanged,
            compute_dtype=jnp.bfloat16,
            backend=backend,
        )

    y = jax.eval_shape(product, x, kernel)
    g = jnp.float32(rng.normal(size=y.shape))
    d_x, d_kernel = jax.jit(lambda x, k, g: jax.vjp(product, x, k)[1](g))(x, kernel, g)
    alpha = xnor.scale(kernel) / np.float32(keep_rate)
    with jax.enable_x64(True):
        signs, kernel_signs = (
            jnp.asarray(np.where(a >= 0, 1.0, -1.0)) for a in (x, kernel)
        )
        signs = signs if keep is None else jnp.where(keep, signs, 0)
        _, pull = jax.vjp(partial(real_product, geometry, groups), signs, kernel_signs)

        def bfloat16(a):
            return jnp.asarray(np.asarray(a.astype(jnp.bfloat16), np.float64))

        expected_x = np.where(jnp.abs(x) < 1, pull(bfloat16(alpha * g))[0], 0)
        expected_x = expected_x if keep is None else np.where(keep, expected_x, 0)
        expected_kernel = np.asarray(pull(bfloat16(g))[1])
        expected_kernel = expected_kernel / keep_rate
    # Sums that cancel have the absolute error of float32.
    np.testing.assert_allclose(d_x, expected_x, rtol=2**-8, atol=1e-5)
    np.testing.assert_array_equal(d_x, scaled.rounded(d_x, jnp.bfloat16))
    np.testing.assert_allclose(d_kernel, expected_kernel, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_programs_for_a_gpu_multiply_bfloat16():
    """Forward results are float32, exactly; gradients bfloat16, except the kernel's."""
    for name, (geometry, groups) in CASES.items():
        x, kernel = draw(geometry, groups)
        product = partial(
            training.binary_product,
            geometry=geometry,
            groups=groups,
            rule=unchanged,
            compute_dtype=jnp.bfloat16,
        )

        def step(x, kernel, product=product):
            y, pull = jax.vjp(product, x, kernel)
            return y, pull(y)

        traced = jax.jit(step).trace(x, kernel)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        lines = [
            line
            for line in text.splitlines()
            if "stablehlo.convolution" in line or "stablehlo.dot_general" in line
        ]
        found = []
        for line in lines:
            operands, result = line.rsplit(" : ", 1)[1].split(" -> ")
            found.append((operands.count("bf16>"), result.strip().rsplit("x")[-1]))
        # XLA would widen the operands of a convolution into float32; so does `scaled`.
        kernel_gradient = 2 if name in ("dense", "1×1") else 0
        assert sorted(found) == sorted(
            [(2, "f32>"), (2, "bf16>"), (kernel_gradient, "f32>")]
        )


@pytest.mark.slow
def test_layers_use_their_compute_dtype():
    x = jnp.ones((2, 6, 6, 4))
    options = {"compute_dtype": "bfloat16", "backend": "float", "rngs": nnx.Rngs(0)}
    for layer, inputs in (
        (xnor.nn.XnorBlock(4, 5, (3, 3), **options), x),
        (xnor.nn.BinaryLinear(4, 5, **options), x[0, 0]),
    ):
        layer.eval()
        text = jax.jit(lambda x, layer=layer: layer(x)).lower(inputs).as_text()
        assert "bf16" in text
        assert layer(inputs).dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "float16"}, "expected float32 or bfloat16, got float16"),
        ({"compute_dtype": "bfloat16", "binary": False}, "float32 with binary=False"),
    ],
)
def test_other_dtypes_and_the_float_twin_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        xnor.nn.BinaryLinear(4, 5, **options, rngs=nnx.Rngs(0))
