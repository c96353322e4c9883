"""With 64-bit types enabled, results and their dtypes stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import packed_networks
import pytest
import reference_loop as loop
from bit_oracles import sign
from flax import nnx

import xnor_jax as xnor
from xnor_jax import ops


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        assert jnp.zeros(()).dtype == jnp.float64
        yield


def draw(*shape, dtype="f"):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("backend", ["auto", *ops.available_backends()])
def test_sums_are_int32_and_bits_uint32(backend, dtype):
    x, kernel = draw(2, 6, 5, 40, dtype=dtype), draw(3, 3, 20, 34, dtype=dtype)
    options = {"strides": 1, "padding": "SAME", "groups": 2}
    sums = ops.binary_conv(x, kernel, **options, backend=backend)
    assert sums.dtype == jnp.int32
    pads = ((1, 1), (1, 1))
    expected = loop.conv(sign(x), sign(kernel), (1, 1), pads, (1, 1), 2)
    np.testing.assert_array_equal(sums, expected)

    bits, packed = ops.sign_bits(x, backend=backend), ops.pack_kernel(kernel, 2)
    assert bits.words.dtype == packed.words.dtype == jnp.uint32
    limit = ops.Threshold(jnp.zeros(34, jnp.int32), jnp.zeros(2, jnp.uint32))
    signs = ops.packed_conv(bits, packed, limit, **options, backend=backend)
    assert isinstance(signs, ops.Bits) and signs.words.dtype == jnp.uint32
    negative = ops.unpack_bits(signs.words, 34) < 0
    np.testing.assert_array_equal(negative, expected < 0)

    dense = ops.binary_matmul(x, kernel[0, 0].repeat(2, 0), backend=backend)
    assert dense.dtype == jnp.int32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "float"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_layer_and_its_gradient_keep_their_dtypes(backend, dtype):
    x = draw(2, 6, 5, 40, dtype=dtype)
    layer = xnor.nn.XnorBlock(
        *(40, 33, (3, 3)),
        backend=backend,
        dropout=0.5,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    layer.eval()
    y = layer(x)
    assert y.dtype == dtype and y.shape == (2, 6, 5, 33)
    layer.train()
    gradient = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    assert gradient["layer"]["kernel"][...].dtype == dtype
    assert bool(jnp.isfinite(gradient["layer"]["kernel"][...]).all())


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    ["auto", *ops.available_backends()],
)
def test_packed_network_gives_the_same_logits(backend):
    model = packed_networks.Net(
        (8, 8, 3),
        packed_networks.conv(3, 33, (3, 3)),
        packed_networks.block(33, 34, (3, 3)),
        xnor.nn.AvgPool(2, 2),
        packed_networks.block(34, 35, (3, 3)),
        xnor.nn.MaxPool(2, 2),
        xnor.nn.GlobalAveragePool(),
        packed_networks.linear(35, 3),
    )
    model.eval()
    x = draw(4, 8, 8, 3)
    logits = xnor.pack(model, backend=backend)(x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, model(x), rtol=1e-4, atol=1e-4)
