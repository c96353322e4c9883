"""Networks with their own `__call__`: their products are packed, and tried."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest
from flax import nnx
from packing import block, conv, linear, norm

import xnor_jax as xnor


class Residual(nnx.Module):
    """What no list of layers says: a sum of branches, of masked and own layers."""

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
        return {"logits": self.dense5(self.block4(x)), "inner": x}


class Two(nnx.Module):
    """Two dense layers; `between` is what the second gets."""

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


def general(*features):
    return nnx.LinearGeneral(*features, rngs=nnx.Rngs(0))


def tiny(between=xnor.sign_ste, second=lambda: None):
    return packing.randomized(
        nnx.eval_shape(lambda: Two(between, second())), exact=True
    )


X = packing.images(5, 4, 3, 3)
ROW = packing.images(5, 3)


def test_a_residual_network_runs_on_bits():
    # With exact sums: no sign hangs on whether α is multiplied before or after.
    model = packing.randomized(nnx.eval_shape(Residual), exact=True)
    inner = mask(model, "branches/0", "branches/1")
    model.train()
    packed = xnor.pack(model, inner, example=X[:2])
    assert not model.norm2.use_running_average
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    binary = xnor.binarize(params, inner)
    wanted = jax.jit(lambda p, r, x: nnx.merge(graphdef, p, r)(x))(binary, rest, X)
    for name, value in wanted.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(jnp.abs(value).max())}
        np.testing.assert_allclose(packed(X)[name], value, **tolerance)
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
    assert rows["branches/1"].bytes_after == 8 * 32 // 8 + 8 * 8
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert packed.report.bytes_before == 4 * count


def test_it_cannot_be_saved(tmp_path):
    packed = xnor.pack(model := tiny(), mask(model, "dense2"), example=ROW)
    assert packed.classes is None
    assert jax.tree.leaves(packed)
    with pytest.raises(ValueError, match="Two with a __call__ of its own"):
        xnor.save(tmp_path / "file", packed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "names", "said"),
    [
        ({"between": nnx.tanh}, ["dense2"], "dense2: .* not ±1 .*sign_ste"),
        ({"between": partial(jnp.clip, min=-1, max=1)}, ["dense2"], "dense2: .*not ±1"),
        ({}, ["dense1", "dense2"], "dense1: .* not ±1"),
        ({}, ["unused"], "unused: the example never runs through it"),
        ({}, ["dense2/bias"], "selects dense2/bias, which is no kernel"),
        ({"second": lambda: general(8, 4)}, ["dense2"], "dense2/kernel, which is no"),
        (
            {"second": lambda: linear(8, 4, dot_general=jax.lax.dot)},
            ["dense2"],
            "dense2: dot_general cannot be packed",
        ),
    ],
)
def test_what_cannot_be_packed_is_named(options, names, said):
    model = tiny(**options)
    with pytest.raises(ValueError, match=f"pack: .*{said}"):
        xnor.pack(model, mask(model, *names), example=ROW)


def test_a_binary_layer_with_its_own_call_is_refused():
    class Reversed(xnor.nn.BinaryLinear):
        def __call__(self, x):
            return super().__call__(x[..., ::-1])

    model = tiny(second=lambda: Reversed(8, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="dense2: Reversed has a __call__ of its own"):
        xnor.pack(model, example=ROW)


def test_an_example_and_a_binary_layer_are_needed():
    with pytest.raises(ValueError, match="expected an example"):
        xnor.pack(model := tiny(), mask(model, "dense2"))
    with pytest.raises(ValueError, match="expected a model with a binary layer"):
        xnor.pack(tiny(), example=ROW)
    with pytest.raises(ValueError, match="batch of floats"):
        xnor.pack(model, mask(model, "dense2"), example=np.ones((2, 3), int))


def test_a_stack_of_layers_is_refused_by_name():
    class Scanned(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: xnor.nn.BinaryLinear(3, 3, rngs=rngs))
            self.stack = make(rngs.split(2))

        def __call__(self, x):
            step = nnx.scan(
                lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
            )
            return step(x, self.stack)

    model = Scanned(nnx.Rngs(0))
    assert model(ROW).shape == (5, 3)
    with pytest.raises(ValueError, match="pack: stack: .* a stack of BinaryLinear"):
        xnor.pack(model, example=ROW)
