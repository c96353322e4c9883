"""Networks with a custom `__call__`, and masks: each binary kernel is tracked."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import packed_networks
import pytest
from flax import nnx
from packed_networks import block, conv, linear, norm

import xnor_jax as xnor


class Residual(nnx.Module):
    """A non-sequential network: a sum of masked branches, and residual blocks."""

    def __init__(self):
        self.conv1 = conv(3, 8, (3, 3))
        self.norm2 = norm(8)
        self.branches = nnx.List(
            [
                conv(8, 8, (3, 3), feature_group_count=2),
                conv(8, 8, (2, 2), kernel_dilation=2, use_bias=False),
            ]
        )
        self.block3 = block(8, 8, (3, 3), relu=False, input_scale=True)
        self.block4 = block(8 * 12, 20, norm_features=8, dropout=0.5)
        self.dense5 = linear(20, 4)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        signs = xnor.sign_ste(self.norm2(x))
        x = x + sum(branch(signs) for branch in self.branches)
        x = x + self.block3(x)
        return self.dense5(self.block4(x))


class TwoLayers(nnx.Module):
    """Two dense layers with the function `between` between them."""

    def __init__(self, between, second=None):
        self.dense1 = linear(3, 8)
        self.dense2 = second or linear(8, 4)
        self.unused = linear(8, 4)
        self.between = between

    def __call__(self, x):
        return self.dense2(self.between(self.dense1(x)))


def mask(model, *names):
    params = nnx.state(model, nnx.Param)
    return xnor.mask_by_path(
        params, lambda path, _: path.removesuffix("/kernel") in names
    )


def tiny(between=xnor.sign_ste, second=lambda: None):
    return packed_networks.randomized(
        nnx.eval_shape(lambda: TwoLayers(between, second())), exact=True
    )


X = packed_networks.images(5, 4, 3, 3)
ROW = packed_networks.images(5, 3)


@pytest.mark.slow
def test_residual_network_with_mask_matches_float():
    # With exact sums, no sign depends on whether α is multiplied before or after.
    masked = [f"branches/{index}/kernel" for index in range(2)]
    model = packed_networks.randomized(
        nnx.eval_shape(Residual), exact=True, masked=masked
    )
    inner = mask(model, "branches/0", "branches/1")
    packed = xnor.pack(model, inner, example=X[:2])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    binary = xnor.binarize(params, inner)
    wanted = jax.jit(lambda p, r, x: nnx.merge(graphdef, p, r)(x))(binary, rest, X)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(jnp.abs(wanted).max())}
    np.testing.assert_allclose(packed(X), wanted, **tolerance)
    rows = {row.name: row for row in packed.report.rows}
    assert [n for n, row in rows.items() if row.kind == "binary"] == [
        "branches/0",
        "branches/1",
        "block3/layer",
        "block4/layer",
    ]
    assert rows["conv1"].real_macs == 12 * 8 * 27
    assert rows["branches/0"].binary_macs == 12 * 8 * 36
    assert rows["branches/1"].binary_macs == 12 * 8 * 32
    assert rows["dense5"].real_macs == 80
    # Signs, α and bias; the threshold after the sum, a float and a bit per channel.
    assert rows["branches/1"].bytes_after == 8 * 32 // 8 + 8 * 8 + 8 * 4 + 1
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert packed.report.bytes_before == 4 * count


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        (
            {"between": nnx.tanh},
            ["dense2"],
            "dense2/kernel .*not known to be ±1.* tanh",
        ),
        (
            {"between": partial(jnp.clip, min=-1, max=1)},
            ["dense2"],
            "dense2/kernel .*±1",
        ),
        ({}, ["dense1", "dense2"], "dense1/kernel .* network's own input"),
        ({}, ["unused"], "selects unused/kernel, not used in any product"),
    ],
)
def test_invalid_binary_kernels_are_named(options, names, message):
    model = tiny(**options)
    with pytest.raises(ValueError, match=f"pack: .*{message}"):
        xnor.pack(model, mask(model, *names), example=ROW)


def test_binary_layer_with_custom_call_is_packed():
    class Reversed(xnor.nn.BinaryLinear):
        def __call__(self, x):
            return super().__call__(x[..., ::-1])

    model = tiny(second=lambda: Reversed(8, 4, rngs=nnx.Rngs(0)))
    packed = xnor.pack(model, example=ROW)
    np.testing.assert_allclose(packed(ROW), model(ROW), rtol=1e-5, atol=1e-5)


def test_missing_example_or_binary_layer_is_refused():
    with pytest.raises(ValueError, match="expected an example"):
        xnor.pack(model := tiny(), mask(model, "dense2"))
    with pytest.raises(ValueError, match="expected a model with a binary layer"):
        xnor.pack(tiny(), example=ROW)
