"""The float network of the benchmark computes the packed network's logits."""

import jax
import numpy as np
import packed_networks
import pytest
from flax import nnx
from packed_networks import Net, block, conv, linear, norm, signals, volumes

import xnor_jax as xnor
from xnor_jax.nn import AvgPool, MaxPool
from xnor_jax.packing.unpacked import unpack


def image():
    """Both kinds of threshold, groups, pools of falling channels, flattened images."""
    return Net(
        (11, 9, 3),
        conv(3, 36, (3, 2), strides=(2, 1), padding=1),
        norm(36),
        nnx.relu,
        block(36, 40, (3, 3), padding=2, feature_group_count=4, relu=False),
        MaxPool((2, 3), (1, 2), ((1, 0), (1, 1))),
        block(40, 33, (2, 3), kernel_dilation=(2, 1)),
        AvgPool(3, 2, 1),
        block(33, 35, (1, 1)),
        AvgPool(2, 1),
        norm(35),
        xnor.nn.BinaryConv(35, 34, (2, 1), padding="VALID", rngs=nnx.Rngs(0)),
        block(34 * 4, 21, norm_features=34),
        linear(21, 5),
    )


def scaled():
    return Net(
        (8, 7, 3),
        conv(3, 34, (3, 3)),
        nnx.relu,
        block(34, 36, (3, 2), strides=2, padding=1, input_scale=True),
        block(36 * 4 * 4, 30, norm_features=36, input_scale=True),
        linear(30, 4),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        image,
        signals,
        volumes,
        scaled,
    ],
)
def test_unpacked_network_matches_packed_logits(network):
    exact = network is not scaled
    model = packed_networks.randomized(nnx.eval_shape(network), exact=exact)
    packed = xnor.pack(model, backend="xla")
    x = packed_networks.images(6, *model.image_shape)
    logits = packed(x)
    scale = float(np.abs(logits).max())
    for xla_conv in (False, True):
        floats = jax.jit(unpack(packed, xla_conv=xla_conv))(x)
        np.testing.assert_allclose(floats, logits, rtol=1e-4, atol=1e-4 * scale)


def test_unpacked_program_has_no_popcount():
    packed = xnor.pack(packed_networks.randomized(nnx.eval_shape(volumes)))
    x = packed_networks.images(2, 4, 5, 3, 2)
    program = jax.jit(unpack(packed)).lower(x).as_text()
    assert "popcnt" not in program and "xnor_jax" not in program
    assert "popcnt" in jax.jit(packed.with_backend("xla")).lower(x).as_text()
