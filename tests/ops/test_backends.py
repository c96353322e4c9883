from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import xnor_jax as xnor
from xnor_jax import ops
from xnor_jax.ops import cpu

IMAGES, KERNEL = jnp.ones((2, 5, 5, 40)), jnp.ones((3, 3, 40, 8))


def call(x, kernel, backend="auto"):
    return ops.binary_conv(x, kernel, strides=1, padding="SAME", backend=backend)


def lowered(x, kernel):
    """Lower a new function each time: `auto` changes here, and jit would cache it."""
    return jax.jit(lambda x, kernel: call(x, kernel)).lower(x, kernel).as_text()


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(cpu, "is_available", lambda: False)


def test_four_backends_are_always_available():
    assert ops.available_backends()[:4] == ("float", "xla", "gpu", "pallas")
    assert ("cpu" in ops.available_backends()) == cpu.is_available()


def test_auto_uses_xla_without_the_library(without_library):
    assert ops.available_backends() == ("float", "xla", "gpu", "pallas")
    text = lowered(IMAGES, KERNEL)
    assert "popcnt" in text
    assert "custom_call" not in text
    np.testing.assert_array_equal(
        call(IMAGES, KERNEL), call(IMAGES, KERNEL, backend="float")
    )


@pytest.mark.parametrize("rank", [0, 2, 3])
def test_an_unavailable_backend_raises(without_library, rank):
    with pytest.raises(RuntimeError) as raised:
        if rank == 0:
            ops.binary_matmul(jnp.ones((2, 3)), jnp.ones((3, 2)), backend="cpu")
        else:
            x, kernel = jnp.ones((1, *(3,) * rank, 2)), jnp.ones((*(1,) * rank, 2, 2))
            call(x, kernel, backend="cpu")
    assert "the backend 'cpu' is not available: its library was not built" in str(
        raised.value
    )


@pytest.mark.skipif(not cpu.is_available(), reason="the cpu backend was not built")
def test_cpu_refuses_3d_and_auto_falls_back():
    x, kernel = jnp.ones((1, 3, 3, 3, 2)), jnp.ones((2, 2, 2, 2, 2))
    with pytest.raises(
        ValueError, match="'cpu' supports at most 2 spatial axes, got 3"
    ):
        call(x, kernel, backend="cpu")
    assert "custom_call" not in lowered(x, kernel)


@pytest.mark.skipif(not cpu.is_available(), reason="the cpu backend was not built")
def test_auto_calls_the_library_in_programs_for_a_cpu():
    if jax.default_backend() != "cpu":
        pytest.skip("programs here are for another platform")
    text = lowered(IMAGES, KERNEL)
    assert "xnor_jax_run" in text
    assert "popcnt" not in text


def every_operation(x, kernel, dense, backend):
    """Call every operation of a packed network."""
    packed = ops.sign_bits(x, backend=backend)
    limit = ops.Threshold(jnp.zeros(8, jnp.int32), jnp.zeros(1, jnp.uint32))
    hidden = ops.packed_conv(
        packed, ops.pack_kernel(kernel), limit, strides=1, padding=1, backend=backend
    )
    hidden = ops.pool_bits(hidden, limit.flip, window=2, strides=2, padding=0)
    first = ops.real_conv(x, kernel, ops.Sums(), strides=1, padding=1, backend=backend)
    other = ops.sum_pool_bits(
        first,
        ops.Threshold(jnp.zeros(8), limit.flip),
        window=2,
        strides=2,
        padding=0,
        backend=backend,
    )
    words = hidden.words ^ other.words
    signs = ops.unpack_bits(words, 8).reshape(x.shape[0], -1)
    affine = ops.Affine(jnp.ones(3), jnp.ones(3))
    return ops.packed_matmul(
        ops.sign_bits(signs, backend=backend),
        ops.pack_kernel(dense),
        affine,
        backend=backend,
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("backend", ["auto", "float", "xla", "gpu"])
def test_programs_lower_for_other_platforms_without_the_cpu_call(platform, backend):
    run = jax.jit(partial(every_operation, backend=backend))
    exported = export.export(run, platforms=[platform])(
        IMAGES, KERNEL, jnp.ones((32, 3))
    )
    assert "xnor_jax_" not in exported.mlir_module()
    assert exported.platforms == (platform,)


@pytest.mark.parametrize("backend", ["float", "xla", "gpu"])
def test_an_exported_program_gives_the_same_integers(backend):
    rng = np.random.default_rng(0)
    x = rng.normal(size=IMAGES.shape).astype("f")
    kernel = rng.normal(size=KERNEL.shape).astype("f")
    run = partial(call, backend=backend)
    exported = export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(x, kernel)
    if jax.default_backend() in exported.platforms:
        np.testing.assert_array_equal(exported.call(x, kernel), run(x, kernel))


def test_gpu_multiplies_int8_into_int32():
    run = jax.jit(partial(call, backend="gpu"))
    text = run.trace(IMAGES, KERNEL).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 1
    operands, result = products[0].rsplit(" : ", 1)[1].split(" -> ")
    assert operands.count("xi8>") == 2
    assert result.strip().endswith("xi32>")
    assert "stablehlo.convolution" not in text


def test_filters_that_could_overflow_int32_are_refused():
    a = jax.ShapeDtypeStruct((1, 2**30), jnp.float32)
    b = jax.ShapeDtypeStruct((2**30, 1), jnp.float32)
    with pytest.raises(ValueError, match="^binary_matmul: .* at most 1073741823"):
        jax.eval_shape(partial(ops.binary_matmul, backend="xla"), a, b)


def test_float_refuses_sums_inexact_in_float32():
    a = jax.ShapeDtypeStruct((1, 2**24 + 1), jnp.float32)
    b = jax.ShapeDtypeStruct((2**24 + 1, 1), jnp.float32)
    with pytest.raises(
        ValueError, match="float: expected a filter of at most 16777216"
    ):
        jax.eval_shape(partial(ops.binary_matmul, backend="float"), a, b)


@pytest.fixture(scope="module")
def evaluations():
    """Functions of a batch of images to export, by name."""
    layer = xnor.nn.BinaryConv(40, 33, (3, 3), rngs=nnx.Rngs(0))
    net = nnx.Sequential(
        nnx.Conv(40, 33, (3, 3), rngs=nnx.Rngs(0)),
        xnor.nn.XnorBlock(33, 34, (3, 3), rngs=nnx.Rngs(1)),
        xnor.nn.AvgPool(2, 2),
        xnor.nn.XnorBlock(34, 35, (2, 2), rngs=nnx.Rngs(2)),
        xnor.nn.GlobalAveragePool(),
        nnx.Linear(35, 3, rngs=nnx.Rngs(3)),
    )
    net.eval()
    packed = xnor.pack(net, example=IMAGES)
    return {
        "layer": layer,
        "model": net,
        **{f"ops {b}": partial(every_operation, backend=b) for b in BACKENDS},
        **{f"packed {b}": packed.with_backend(b) for b in BACKENDS},
    }


BACKENDS = ("auto", "float", "xla", "gpu")
EVALUATIONS = (
    "layer",
    "model",
    *(f"{k} {b}" for k in ("ops", "packed") for b in BACKENDS),
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if "auto" in name else [pytest.mark.slow])
        for name in EVALUATIONS
    ],
)
def test_symbolic_batch_size_is_exported(evaluations, name):
    function, arguments = evaluations[name], []
    if name.startswith("ops"):
        arguments = [KERNEL, jnp.ones((32, 3))]
    (n,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *IMAGES.shape[1:]), jnp.float32)
    jitted = jax.jit(lambda x, *rest: function(x, *rest))
    for platforms in (["cuda"], ["cuda", "tpu"]):
        exported = export.export(jitted, platforms=platforms)(images, *arguments)
        assert exported.out_avals[0].shape[0] == n
        assert "xnor_jax_" not in exported.mlir_module()
    compiled = name in ("layer", "model", "ops auto", "packed auto")
    if compiled and cpu.is_available():
        with pytest.raises(ValueError, match=r'with_backend\("xla"\).*backend="float"'):
            export.export(jitted, platforms=["cpu"])(images, *arguments)
        return
    exported = export.export(jitted, platforms=["cpu"])(images, *arguments)
    x = np.random.default_rng(0).normal(size=(3, *IMAGES.shape[1:])).astype("f")
    y = exported.call(x, *arguments)
    np.testing.assert_allclose(y, jitted(x, *arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ops.available_backends(), "auto"])
def test_layers_train_with_their_backend_or_refuse_it(name):
    options: Any = {"backend": name, "rngs": nnx.Rngs(0)}
    for make in (
        lambda: xnor.nn.XnorBlock(40, 8, (3, 3), **options),
        lambda: xnor.nn.BinaryConv(40, 8, (3, 3), padding=1, **options),
        lambda: xnor.nn.BinaryLinear(40, 8, **options),
    ):
        if name in ("auto", "float", "cpu"):
            assert make()(IMAGES).shape == (2, 5, 5, 8)
            continue
        with pytest.raises(
            ValueError, match=f"{name!r} has no gradients; .* auto, float, cpu"
        ):
            make()


@pytest.mark.parametrize("name", ["tpu", "", None, 1, ("cpu",)])
def test_unknown_backend_error_lists_the_backends(name):
    with pytest.raises(ValueError, match="binary_conv: unknown backend.*auto, float"):
        call(IMAGES, KERNEL, backend=name)
    with pytest.raises(ValueError, match="unknown backend.*auto, float, cpu"):
        xnor.nn.BinaryLinear(40, 8, backend=name, rngs=nnx.Rngs(0))


UNSUPPORTED_LAYERS = {
    "groups": lambda **o: xnor.nn.BinaryConv(40, 8, (3, 3), feature_group_count=4, **o),
    "groups of floats": lambda **o: xnor.nn.Conv(
        40, 8, (3, 3), feature_group_count=2, **o
    ),
    "float twin": lambda **o: xnor.nn.BinaryConv(
        40, 8, (3, 3), feature_group_count=2, binary=False, **o
    ),
    "dtype": lambda **o: xnor.nn.BinaryConv(40, 8, (3, 3), dtype=jnp.bfloat16, **o),
    "dtype of the kernel": lambda **o: xnor.nn.BinaryLinear(
        40, 8, dtype=jnp.float32, param_dtype=jnp.bfloat16, **o
    ),
    "dtype of floats": lambda **o: xnor.nn.Conv(40, 8, (3, 3), dtype=jnp.float16, **o),
}


@pytest.mark.slow
@pytest.mark.skipif(not cpu.is_available(), reason="the cpu backend was not built")
@pytest.mark.parametrize("name", UNSUPPORTED_LAYERS)
def test_cpu_refuses_layers_it_cannot_train(name):
    make = UNSUPPORTED_LAYERS[name]
    layer = make(backend="cpu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the backend 'cpu' supports only one group"):
        layer(IMAGES)
    for backend in ("auto", "float"):
        make(backend=backend, rngs=nnx.Rngs(0))(IMAGES)


@pytest.mark.skipif(not cpu.is_available(), reason="the cpu backend was not built")
def test_cpu_error_names_the_unsupported_dtype():
    make = UNSUPPORTED_LAYERS["dtype of the kernel"]
    with pytest.raises(ValueError, match="got feature_group_count=1 and bfloat16"):
        make(backend="cpu", rngs=nnx.Rngs(0))(IMAGES)
