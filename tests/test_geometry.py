"""Window positions and argument checks, equal in every public function."""

from itertools import product
from typing import Any

import bit_oracles as oracle
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx
from jax import lax

import xnor_jax as xnor
from xnor_jax import ops
from xnor_jax.geometry import LARGEST_SIZE, conv_geometry, pool_geometry


@hypothesis.given(oracle.cases())
def test_window_geometry_matches_numpy_padding(case):
    options = {k: v for k, v in case.options.items() if k != "groups"}
    geometry = conv_geometry("test", case.spatial, case.window, **options)
    assert geometry.padding == case.pads
    axes = case.spatial, case.pads, case.window, case.strides, case.dilation
    per_axis = zip(*axes, strict=True)
    assert geometry.out == tuple(
        len(range(0, size + sum(pads) - (k - 1) * d, s))
        for size, pads, k, s, d in per_axis
    )
    axes = (case.spatial, geometry.padding, geometry.shifts, geometry.inside)
    for size, (before, after), shifts, inside in zip(*axes, strict=True):
        padded = np.pad(np.ones(size, bool), (before, after))
        for tap, shift in enumerate(shifts):
            np.testing.assert_array_equal(padded[shift], inside[:, tap])
    assert geometry.padded == any(map(any, case.pads))
    assert len(list(product(*geometry.shifts))) == np.prod(case.window)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(oracle.cases())
def test_same_and_valid_padding_match_lax(case):
    axes = case.spatial, case.window
    options = {"strides": case.strides, "dilation": case.dilation}
    same = conv_geometry("test", *axes, **options, padding="SAME").padding
    extents = [(k - 1) * d + 1 for k, d in zip(case.window, case.dilation, strict=True)]
    by_lax = lax.padtype_to_pads(case.spatial, extents, case.strides, "SAME")
    assert same == tuple(by_lax) == loop.same_pads(*axes, *options.values())
    if all(k <= size for k, size in zip(extents, case.spatial, strict=True)):
        valid = conv_geometry("test", *axes, **options, padding="VALID").padding
        assert valid == ((0, 0),) * len(case.window)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (2, ((2, 2), (2, 2))),
        (np.int64(2), ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        ([(0, 1), 2], ((0, 1), (2, 2))),
        ([[0, 1], [2, 3]], ((0, 1), (2, 3))),
        (np.array([[0, 1], [2, 3]]), ((0, 1), (2, 3))),
    ],
)
def test_padding_accepts_integers_and_pairs(padding, expected):
    geometry = conv_geometry("test", (5, 5), 3, strides=np.int8(1), padding=padding)
    assert geometry.padding == expected
    assert {type(p) for pair in geometry.padding for p in pair} == {int}
    assert hash(geometry) is not None and geometry.window == (3, 3)


SIGNS = np.where(np.random.default_rng(0).random((2, 5, 5, 32)) < 0.5, -1, 1)
IMAGES = jnp.asarray(SIGNS, jnp.float32)
BITS = ops.sign_bits(IMAGES)
KERNEL = jnp.ones((3, 3, 32, 32))
LIMIT = ops.Threshold(jnp.zeros(32), jnp.zeros(1, jnp.uint32))


def layer(strides: Any, padding: Any, dilation: Any):
    return xnor.nn.BinaryConv(
        *(32, 32, (3, 3), strides),
        padding=padding,
        kernel_dilation=dilation,
        rngs=nnx.Rngs(0),
    )(IMAGES)


def conv_calls(strides: Any = 1, padding: Any = "SAME", dilation: Any = 1):
    options = {"strides": strides, "padding": padding, "dilation": dilation}
    packed = ops.pack_kernel(KERNEL)
    return {
        "binary_conv": lambda: ops.binary_conv(IMAGES, KERNEL, **options),
        "packed_conv": lambda: ops.packed_conv(BITS, packed, ops.Sums(), **options),
        "real_conv": lambda: ops.real_conv(IMAGES, KERNEL, ops.Sums(), **options),
        "BinaryConv": lambda: layer(strides, padding, dilation),
    }


def pool_calls(window: Any = 2, strides: Any = 2, padding: Any = "VALID"):
    options = {"window": window, "strides": strides, "padding": padding}
    flip = jnp.zeros(1, jnp.uint32)
    return {
        "pool_bits": lambda: ops.pool_bits(BITS, flip, **options),
        "sum_pool_bits": lambda: ops.sum_pool_bits(IMAGES, LIMIT, **options),
        "MaxPool": lambda: xnor.nn.MaxPool(**options)(IMAGES),
        "AvgPool": lambda: xnor.nn.AvgPool(**options)(IMAGES),
    }


BAD_SIZES = (
    *(0, -1, 2**31, 2**32, 2**63, 10**30, True, np.True_, 1.0, 1.5, "2", None, b"2"),
    *(float("nan"), float("inf"), np.float32(2), jnp.float32(1), {1: 1}),
    *((), (1,), (1, 1, 1), (1, 0), (0, 1), (1, 2**31), (True, 1), (1, 1.0), (1, None)),
    *([[1, 1]], np.array([1.0, 1.0]), np.array([0, 1]), np.ones((2, 2), int)),
)


@pytest.mark.parametrize("value", BAD_SIZES, ids=repr)
def test_window_arguments_out_of_range_are_refused_by_name(value):
    calls = [
        *(("strides", call) for call in conv_calls(strides=value).items()),
        *(("dilation", call) for call in conv_calls(dilation=value).items()),
        *(("strides", call) for call in pool_calls(strides=value).items()),
        *(("window", call) for call in pool_calls(window=value).items()),
    ]
    for argument, (function, call) in calls:
        with pytest.raises(ValueError, match=f"^{function}: .*{argument}"):
            call()


@pytest.mark.parametrize(
    "value",
    [
        *(-1, 2**31, 2**32, 2**63, 10**30, True, 1.0, None, "same", "FULL", b"SAME"),
        *((), (1,), (1, 1, 1), (1, -1), (1, 2**31), ((0, 1),) * 3, ((1, 1, 1),) * 2),
        *(((0, 2**32), 0), ((0, True), 0), ((0, 1.0), 0), ((0,), 0), (None, 1)),
        # Each value is in range, but the padded image is too large.
        *(
            LARGEST_SIZE,
            2**30,
            ((LARGEST_SIZE, LARGEST_SIZE), 0),
            ((2**16, 0), (0, 2**16)),
        ),
    ],
    ids=repr,
)
def test_padding_out_of_range_is_refused_by_name(value):
    calls = {**conv_calls(padding=value), **pool_calls(window=2**31 - 1, padding=value)}
    for function, call in calls.items():
        with pytest.raises(ValueError, match=f"^{function}: .*(padding|padded)"):
            call()


@pytest.mark.parametrize("groups", [0, -1, 2**31, True, 1.0, None, "1", (1,)], ids=repr)
def test_groups_out_of_range_are_refused_by_name(groups):
    options: dict[str, Any] = {"strides": 1, "padding": "SAME", "groups": groups}
    packed = ops.pack_kernel(KERNEL)
    calls = {
        "binary_conv": lambda: ops.binary_conv(IMAGES, KERNEL, **options),
        "packed_conv": lambda: ops.packed_conv(BITS, packed, ops.Sums(), **options),
        "real_conv": lambda: ops.real_conv(IMAGES, KERNEL, ops.Sums(), **options),
        "pack_kernel": lambda: ops.pack_kernel(KERNEL, groups),
        "BinaryConv": lambda: xnor.nn.BinaryConv(
            32, 32, (3, 3), feature_group_count=groups, rngs=nnx.Rngs(0)
        ),
    }
    for function, call in calls.items():
        with pytest.raises(ValueError, match=f"^{function}: .*group"):
            call()


@pytest.mark.parametrize("backend", ops.available_backends())
def test_the_largest_strides_and_dilation_run(backend):
    kernel, options = KERNEL[:1, :1], {"padding": "VALID", "backend": backend}
    expected = IMAGES[:, :1, :1].sum(-1, keepdims=True)
    for strides, dilation in ((LARGEST_SIZE, 1), (LARGEST_SIZE, LARGEST_SIZE)):
        sums = ops.binary_conv(
            IMAGES, kernel, strides=strides, dilation=dilation, **options
        )
        np.testing.assert_array_equal(sums, np.broadcast_to(expected, sums.shape))


def test_pools_refuse_padding_as_large_as_the_window():
    for function, call in pool_calls(window=2, padding=2).items():
        with pytest.raises(ValueError, match=f"{function}: .*padding smaller than"):
            call()
    found = pool_geometry("pool", (5,), 3, strides=np.int64(2), padding=[(2, 1)])
    assert found.out == (3,)


def test_symbolic_spatial_sizes_are_refused():
    (rows,) = jax.export.symbolic_shape("h")
    with pytest.raises(ValueError, match="test: expected images whose spatial sizes"):
        conv_geometry("test", (rows, 5), 3, strides=1, padding="SAME")
