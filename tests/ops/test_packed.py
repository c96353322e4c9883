from functools import partial

import bit_oracles as oracle
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from bit_oracles import Case
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from xnor_jax import ops
from xnor_jax.ops.packed import regroup

BACKENDS = ("auto", *ops.available_backends())

CASES = [
    Case((7, 6), (3, 3), (1, 2), (1, 1), "SAME", 1, 70, 64, 2),
    Case((6, 5), (2, 3), (2, 1), (1, 1), ((1, 0), (2, 2)), 3, 3 * 35, 3 * 11, 2),
    Case((5, 5), (3, 1), (1, 1), (2, 1), "VALID", 2, 2 * 64, 2 * 32, 2),
    Case((9,), (5,), (2,), (1,), ((1, 3),), 1, 33, 40, 3),
]


def operands(case: Case) -> tuple[ops.Bits, ops.PackedKernel]:
    x, kernel = case.arrays()
    return ops.sign_bits(x), ops.pack_kernel(kernel, case.groups)


def thresholds(features: int, spread: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw thresholds and flips; some thresholds make a channel constant."""
    rng = np.random.default_rng(features)
    threshold = rng.integers(-spread, spread + 1, features).astype(np.int32)
    threshold[:: max(2, features // 3)] = np.iinfo(np.int32).min
    return threshold, rng.choice([-1.0, 1.0], features)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_conv_epilogues_match_the_oracle(case, backend):
    x, kernel = operands(case)
    sums = case.sums()
    threshold, flip = thresholds(case.features, int(np.abs(sums).max()))
    scale, bias = np.random.default_rng(0).normal(size=(2, case.features)).astype("f")

    @jax.jit
    def run(x, kernel):
        call = partial(ops.packed_conv, x, kernel, backend=backend, **case.options)
        limit = ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip))
        affine = ops.Affine(jnp.asarray(scale), jnp.asarray(bias), relu=True)
        return call(ops.Sums()), call(affine), call(limit)

    plain, affine, packed = run(x, kernel)
    np.testing.assert_array_equal(plain, sums)
    expected = np.maximum(scale.astype(float) * sums + bias, 0)
    np.testing.assert_allclose(affine, expected, rtol=1e-5, atol=1e-4)
    assert isinstance(packed, ops.Bits)
    assert packed.shape == sums.shape
    value = np.where(sums < threshold, -1.0, 1.0) * flip
    np.testing.assert_array_equal(packed.words, oracle.bits(value))


@pytest.mark.parametrize("relu", [False, True])
def test_affine_results_are_equal_in_float_and_xla(relu):
    case = CASES[0]
    x, kernel = operands(case)
    scale, bias = np.random.default_rng(1).normal(size=(2, case.features)).astype("f")
    affine = ops.Affine(jnp.asarray(scale), jnp.asarray(bias), relu)
    results = [
        ops.packed_conv(x, kernel, affine, backend=backend, **case.options)
        for backend in ("float", "xla")
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_layers_pass_bits_between_them(backend):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 6, 6, 40)).astype("f")
    first = rng.normal(size=(3, 3, 40, 35)).astype("f")
    second = rng.normal(size=(6 * 6 * 35, 10)).astype("f")
    threshold, flip = thresholds(35, 40)

    @jax.jit
    def run(x, first, second):
        hidden = ops.packed_conv(
            x,
            first,
            ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip)),
            strides=1,
            padding="SAME",
            backend=backend,
        )
        # A dense layer on an image uses every pixel's bits, but not the unused bits.
        signs = ops.unpack_bits(hidden.words, hidden.size).reshape(len(x.words), -1)
        flat = ops.sign_bits(signs, backend=backend)
        return ops.packed_matmul(flat, second, ops.Sums(), backend=backend)

    y = run(ops.sign_bits(x), ops.pack_kernel(first), ops.pack_kernel(second))
    signs = oracle.sign(x), oracle.sign(first)
    sums = loop.conv(*signs, (1, 1), ((1, 1), (1, 1)), (1, 1))
    hidden = np.where(sums < threshold, -1, 1) * flip.astype(int)
    np.testing.assert_array_equal(y, hidden.reshape(2, -1) @ oracle.sign(second))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_matmul_keeps_leading_axes(shape, backend):
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(*shape, 70)), rng.normal(size=(70, 40))
    x, kernel = x.astype("f"), kernel.astype("f")
    threshold, flip = thresholds(40, 10)
    limit = ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip))
    call = partial(ops.packed_matmul, backend=backend)
    sums = oracle.sign(x) @ oracle.sign(kernel)
    packed = ops.sign_bits(x), ops.pack_kernel(kernel)
    np.testing.assert_array_equal(call(*packed, ops.Sums()), sums)
    value = np.where(sums < threshold, -1.0, 1.0) * flip
    words = call(*packed, limit).words
    np.testing.assert_array_equal(words, oracle.bits(value))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_gives_an_empty_result(backend):
    kernel = ops.pack_kernel(jnp.ones((3, 3, 5, 40)))
    x = ops.sign_bits(jnp.ones((0, 4, 4, 5)))
    limit = ops.Threshold(jnp.zeros(40, jnp.int32), jnp.zeros(2, jnp.uint32))
    for epilogue, shape in [(ops.Sums(), (0, 2, 2, 40)), (limit, (0, 2, 2, 40))]:
        y = ops.packed_conv(
            x, kernel, epilogue, strides=1, padding="VALID", backend=backend
        )
        assert y.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_with_thresholds(backend):
    call, x, kernel, limit = with_thresholds(backend)
    stacked = jax.tree.map(lambda w: jnp.stack([w, ~w & 0, w]), x)
    mapped = jax.vmap(call, (0, None, None))(stacked, kernel, limit)
    np.testing.assert_array_equal(mapped.words[2], call(x, kernel, limit).words)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("backend", BACKENDS)
def test_shard_map_with_thresholds(backend):
    call, *arrays = with_thresholds(backend)
    mesh = Mesh(np.array(jax.devices()[:2]), ("batch",))
    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(P("batch"), P(), P()), out_specs=P("batch")
    )
    words = jax.jit(sharded)(*arrays).words
    np.testing.assert_array_equal(words, call(*arrays).words)


def with_thresholds(backend):
    case = CASES[0]
    threshold, flip = thresholds(case.features, 40)
    limit = ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip))
    call = partial(ops.packed_conv, backend=backend, **case.options)
    return call, *operands(case), limit


@pytest.mark.slow
@hypothesis.given(
    st.integers(1, 6), st.integers(1, 70), st.integers(0, 2**16), st.booleans()
)
def test_regrouped_words_match_each_group(groups, per_group, seed, batch):
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], (*([3] if batch else []), groups * per_group))
    with jax.disable_jit():
        words = regroup(jnp.asarray(oracle.bits(x)), groups * per_group, groups)
    split = x.reshape(*x.shape[:-1], groups, per_group)
    np.testing.assert_array_equal(words, oracle.bits(split))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_conv_epilogues_match_the_oracle(groups, backend):
    if backend == "cpu" and groups > 1:
        pytest.skip("has one group")
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2, 7, 6, 4)).astype("f")
    kernel = rng.normal(size=(3, 2, 4 // groups, 34)).astype("f")
    scale, bias, threshold = rng.normal(size=(3, 34)).astype("f")
    flip = rng.choice([-1.0, 1.0], 34)
    pads = ((1, 0), (2, 1))
    sums = loop.conv(x.astype(float), kernel, (2, 1), pads, (1, 2), groups)

    @jax.jit
    def run(x, kernel):
        call = partial(
            ops.real_conv,
            x,
            kernel,
            strides=(2, 1),
            padding=pads,
            dilation=(1, 2),
            groups=groups,
            backend=backend,
        )
        affine = ops.Affine(jnp.asarray(scale), jnp.asarray(bias))
        limit = ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip))
        return call(ops.Sums()), call(affine), call(limit)

    plain, affine, packed = run(x, kernel)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(affine, scale * sums + bias, rtol=1e-4, atol=1e-4)
    certain = np.abs(sums - threshold) > 1e-4
    value = np.where(sums < threshold, -1.0, 1.0) * flip
    signs = np.asarray(ops.unpack_bits(packed.words, 34))
    np.testing.assert_array_equal(signs[certain], value[certain])
    assert certain.mean() > 0.99


@pytest.mark.parametrize("backend", [*ops.available_backends()])
def test_real_conv_in_1d_matches_the_oracle_or_is_refused(backend):
    rng = np.random.default_rng(5)
    x, kernel = rng.normal(size=(2, 9, 3)), rng.normal(size=(4, 3, 5))
    arguments = (x.astype("f"), kernel.astype("f"), ops.Sums())
    call = partial(ops.real_conv, *arguments, strides=2, padding=1, backend=backend)
    if backend == "cpu":
        with pytest.raises(ValueError, match="'cpu' supports only 2 spatial axes"):
            call()
        return
    expected = loop.conv(x, kernel, (2,), ((1, 1),), (1,))
    np.testing.assert_allclose(call(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spatial", "window", "strides", "padding"),
    [
        ((7, 6), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((7, 6), (2, 3), (2, 1), ((0, 1), (2, 0))),
        ((8, 8), (2, 2), (2, 2), "VALID"),
        ((7,), (3,), (2,), "SAME"),
        ((4, 5, 3), (2, 2, 2), (1, 2, 1), "VALID"),
    ],
)
@pytest.mark.parametrize("channels", [5, 70])
def test_pool_bits_gives_the_signs_of_max_pooling(
    spatial, window, strides, padding, channels
):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2, *spatial, channels)).astype("f")
    # Increasing and decreasing channels, some of which never change sign.
    slope = rng.choice([-1.0, 1.0], channels).astype("f")
    offset = rng.choice([-9.0, -1.0, 0.2, 1.0, 9.0], channels).astype("f")
    case = Case(spatial, window, strides, (1,) * len(window), padding, 1, 1, 1, 1)
    pads = ((0, 0), *case.pads, (0, 0))
    padded = np.pad(x, pads, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, window, tuple(range(1, x.ndim - 1))
    )
    windows = windows[:, *(slice(None, None, s) for s in strides)]
    pooled = windows.max(axis=tuple(range(-len(window), 0)))
    expected = slope * pooled + offset
    y = ops.pool_bits(
        ops.sign_bits(slope * x + offset),
        ops.pack_bits(slope),
        window=window,
        strides=strides,
        padding=padding,
    )
    assert y.shape == expected.shape
    np.testing.assert_array_equal(y.words, oracle.bits(expected))


@pytest.mark.parametrize("padding", ["VALID", 1, ((1, 0), (2, 1))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_pool_bits_thresholds_window_sums(padding, backend):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(2, 7, 6, 37)).astype("f")
    flip = rng.choice([-1.0, 1.0], 37)
    pads = padding if isinstance(padding, tuple) else ((padding, padding),) * 2
    pads = ((0, 0), (0, 0)) if padding == "VALID" else pads
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    sums = np.zeros((2, *(np.array(padded.shape[1:3]) - 3) // 2 + 1, 37), np.float32)
    for i in range(3):
        for j in range(3):
            rows, columns = (
                slice(t, t + 2 * n - 1, 2)
                for t, n in zip((i, j), sums.shape[1:3], strict=True)
            )
            sums += padded[:, rows, columns]
    # Each threshold equals one of its channel's sums: an extra rounding would show.
    threshold = sums[1, 1, 1]
    y = ops.sum_pool_bits(
        x,
        ops.Threshold(jnp.asarray(threshold), ops.pack_bits(flip)),
        window=3,
        strides=2,
        padding=padding,
        backend=backend,
    )
    value = np.where(sums < threshold, -1.0, 1.0) * flip
    np.testing.assert_array_equal(y.words, oracle.bits(value))
    assert y.size == 37


X = ops.sign_bits(np.ones((2, 5, 5, 40), "f"))
KERNEL = ops.pack_kernel(np.ones((3, 3, 40, 8), "f"))
DENSE = ops.pack_kernel(np.ones((40, 8), "f"))
LIMIT = ops.Threshold(jnp.zeros(40), jnp.zeros(2, jnp.uint32))
conv = partial(ops.packed_conv, strides=1, padding=0)
real = partial(ops.real_conv, epilogue=ops.Sums(), strides=1, padding=0)
pool = partial(ops.pool_bits, window=2, strides=2, padding=0)
sum_pool = partial(ops.sum_pool_bits, window=2, strides=2, padding=0)
FLOATS = np.ones((2, 5, 5, 40), "f")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conv(X.words, KERNEL, ops.Sums()), TypeError, "expected Bits, got"),
        (
            lambda: conv(X, X, ops.Sums()),
            TypeError,
            "expected a PackedKernel, got Bits",
        ),
        (
            lambda: conv(ops.Bits(X.words, 70), KERNEL, ops.Sums()),
            ValueError,
            "expected 3 words for 70 signs",
        ),
        (
            lambda: conv(ops.Bits(X.words, 39), KERNEL, ops.Sums()),
            ValueError,
            "expected 40 input channels for a kernel of 40 and groups=1, got 39",
        ),
        (
            lambda: conv(ops.Bits(X.words.astype(int), 40), KERNEL, ops.Sums()),
            TypeError,
            "uint32 words",
        ),
        (
            lambda: conv(X, ops.PackedKernel(KERNEL.words, 40, 40), ops.Sums()),
            ValueError,
            "for 40 input and 40 output channels, got (1, 1, 3, 3, 2, 32)",
        ),
        (lambda: conv(X, KERNEL, ops.Sums(), groups=2), ValueError, "groups=1"),
        (lambda: conv(X, DENSE, ops.Sums()), ValueError, "1 to 3 spatial axes"),
        (
            lambda: conv(X, KERNEL, ops.Sums(), dilation=3),
            ValueError,
            "fits into the padded image",
        ),
        (
            lambda: ops.packed_matmul(X, KERNEL, ops.Sums()),
            ValueError,
            "a dense kernel of one group, got a window of (3, 3)",
        ),
        (lambda: real(FLOATS.astype("f2"), FLOATS[:1]), TypeError, "x of float32"),
        (
            lambda: real(FLOATS, np.ones((3, 3, 40, 8), int)),
            TypeError,
            "kernel of float32",
        ),
        (
            lambda: real(FLOATS, np.ones((3, 3, 4, 8), "f")),
            ValueError,
            "a kernel of 40 input channels",
        ),
        (
            lambda: pool(X, jnp.zeros(3, jnp.uint32)),
            ValueError,
            "flip of shape (2,), got (3,)",
        ),
        (lambda: pool(X, jnp.zeros(2)), TypeError, "uint32 words"),
        (
            lambda: pool(X, jnp.zeros(2, jnp.uint32), padding=2),
            ValueError,
            "padding smaller than the window",
        ),
        (
            lambda: pool(X, jnp.zeros(2, jnp.uint32), window=(2, 2, 2)),
            ValueError,
            "one for each of 2 spatial axes",
        ),
        (lambda: pool(X, jnp.zeros(2, jnp.uint32), window=0), ValueError, "1 or more"),
        (
            lambda: pool(ops.Bits(X.words[0, 0], 40), jnp.zeros(2, jnp.uint32)),
            ValueError,
            "1 to 3 spatial axes",
        ),
        (lambda: sum_pool(FLOATS.astype(int), LIMIT), TypeError, "x of float32"),
        (
            lambda: sum_pool(FLOATS[0], LIMIT),
            ValueError,
            "[N, H, W, C], got (5, 5, 40)",
        ),
        (lambda: sum_pool(FLOATS, ops.Sums()), TypeError, "a Threshold, got Sums"),
        (
            lambda: sum_pool(FLOATS[..., :39], LIMIT),
            ValueError,
            "threshold of shape (39,), got (40,)",
        ),
        (
            lambda: sum_pool(FLOATS, LIMIT, backend="tpu"),
            ValueError,
            "unknown backend 'tpu'; expected one of auto, float",
        ),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
