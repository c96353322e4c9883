"""The compiled backend: every instruction set, any number of threads, and bad calls.

`.ci/run` runs this file again on a library under AddressSanitizer and UBSan.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import bit_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_loop as loop
from hypothesis import given, settings
from hypothesis import strategies as st

from xnor_jax import ops
from xnor_jax.geometry import Geometry
from xnor_jax.ops import PackedKernel, cpu
from xnor_jax.ops.bits import pack_negative, unpack_negative, words_for
from xnor_jax.ops.cpu import operations

pytestmark = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)


@pytest.fixture(autouse=True)
def restore_instruction_set():
    original = cpu.instruction_set()
    yield
    cpu.use_instruction_set(original)


def on_every_instruction_set(function):
    results = {}
    for name in cpu.instruction_sets():
        cpu.use_instruction_set(name)
        results[name] = jax.tree.map(np.asarray, function())
    return results


@dataclasses.dataclass(frozen=True)
class Case:
    images: np.ndarray  # ±1, [N, H, W, C]
    kernel: np.ndarray  # ±1, [kh, kw, C / groups, C_out]
    options: dict
    seed: int


@st.composite
def cases(draw, largest_channels=70, groups=(1, 1, 1, 2, 3)):
    size = functools.partial(st.integers, 1)
    groups = draw(st.sampled_from(groups))
    c_in, c_out = draw(size(largest_channels)), draw(size(largest_channels))
    window = draw(st.tuples(size(7), size(7)))
    dilation = draw(st.tuples(size(2), size(2)))
    padding = draw(st.tuples(*[st.tuples(st.integers(0, 4), st.integers(0, 4))] * 2))
    span = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    minimum = [max(1, r - sum(p)) for r, p in zip(span, padding, strict=True)]
    spatial = [n + draw(st.integers(0, 6)) for n in minimum]
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    options = {
        "strides": draw(st.tuples(size(3), size(3))),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    shape = (draw(size(3)), *spatial, groups * c_in)
    return Case(
        np.where(rng.random(shape) < 0.5, -1, 1).astype(np.float32),
        np.where(rng.random((*window, c_in, groups * c_out)) < 0.5, -1, 1).astype(
            np.float32
        ),
        options,
        seed,
    )


def sums(case):
    options = dict(case.options)
    pads, arrays = options.pop("padding"), (case.images, case.kernel)
    return loop.conv(*arrays, pads=pads, **options).astype(np.int64)


def packed_bits(negative):
    """Pack signs into words with NumPy's `packbits`."""
    spare = -negative.shape[-1] % 32
    padded = np.pad(negative, [(0, 0)] * (negative.ndim - 1) + [(0, spare)])
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view("<u4")


@given(case=cases())
def test_sums_on_every_instruction_set(case):
    expected = sums(case)
    for name, y in on_every_instruction_set(
        lambda: ops.binary_conv(case.images, case.kernel, **case.options, backend="cpu")
    ).items():
        np.testing.assert_array_equal(y, expected, err_msg=name)


def test_sums_of_long_filters_on_every_instruction_set():
    """Sums beyond 16 bits, for one, two and three panels of 32 filters."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random((5, 70_001)) < 0.5, -1, 1).astype(np.float32)
    kernel = np.where(rng.random((70_001, 80)) < 0.5, -1, 1).astype(np.float32)
    kernel[:, ::7], kernel[:, 1::7] = -x[0, :, None], x[1, :, None]
    for features in (9, 40, 64, 80):
        some = kernel[:, :features]
        expected = x.astype(np.int64) @ some.astype(np.int64)
        for name, y in on_every_instruction_set(
            lambda some=some: ops.binary_matmul(x, some, backend="cpu")
        ).items():
            np.testing.assert_array_equal(y, expected, err_msg=name)


@pytest.mark.slow
@settings(max_examples=20)
@given(drawn=st.lists(oracle.cases((1, 2)), min_size=100, max_size=100))
def test_sums_of_thousands_of_shapes(drawn):
    """Words in, sums out; a hundred shapes per program keep compilation short."""
    words, kernels, expected = [], [], [case.sums() for case in drawn]
    for case in drawn:
        x, kernel = case.arrays()
        grouped = x.reshape(*x.shape[:-1], case.groups, -1)
        words.append(oracle.bits(grouped).reshape(*x.shape[:-1], -1))
        kernels.append(
            PackedKernel(
                oracle.kernel_words(kernel, case.groups),
                kernel.shape[-2],
                case.features,
            )
        )

    @jax.jit
    def run(words, kernels):
        results = []
        for case, x, kernel, y in zip(drawn, words, kernels, expected, strict=True):
            sizes = case.spatial, case.window, case.strides, case.pads, case.dilation
            operation = operations.conv(kernel, ops.Sums(), Geometry(*sizes))
            y = cpu.run(x, [operation], y.shape[1:-1], case.features, jnp.int32)
            results.append(y)
        return results

    for name, sums in on_every_instruction_set(lambda: run(words, kernels)).items():
        for case, y, wanted in zip(drawn, sums, expected, strict=True):
            np.testing.assert_array_equal(y, wanted, err_msg=f"{name}: {case}")


@pytest.mark.slow
@given(case=cases())
def test_epilogues_on_every_instruction_set(case):
    rng = np.random.default_rng(case.seed)
    features, acc = case.kernel.shape[-1], sums(case)
    scale, bias = rng.normal(size=(2, features)).astype(np.float32)
    limit = np.abs(acc).max() + 1
    threshold = rng.integers(-limit, limit + 1, features).astype(np.int32)
    threshold[rng.random(features) < 0.2] = np.iinfo(np.int32).min
    flipped = rng.random(features) < 0.5
    x = ops.sign_bits(case.images)
    kernel = ops.pack_kernel(case.kernel, case.options["groups"])
    run = functools.partial(
        ops.packed_conv,
        x,
        kernel,
        **case.options,
        backend="cpu",
    )
    affine = ops.Affine(jnp.asarray(scale), jnp.asarray(bias), relu=True)
    compare = ops.Threshold(jnp.asarray(threshold), jnp.asarray(packed_bits(flipped)))
    for y in on_every_instruction_set(lambda: run(affine)).values():
        expected = np.maximum(scale * acc.astype(np.float32) + bias, 0)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-5)
    for y in on_every_instruction_set(lambda: run(compare).words).values():
        np.testing.assert_array_equal(y, packed_bits((acc < threshold) ^ flipped))


@given(case=cases(largest_channels=12, groups=(1,)))
def test_real_convolution_on_every_instruction_set(case):
    rng = np.random.default_rng(case.seed)
    real = dataclasses.replace(
        case,
        images=rng.integers(-8, 9, case.images.shape).astype(np.float32),
        kernel=rng.integers(-8, 9, case.kernel.shape).astype(np.float32),
    )
    acc, features = sums(real), case.kernel.shape[-1]
    threshold = rng.integers(-20, 20, features).astype(np.float32)
    flipped = rng.random(features) < 0.5
    compare = ops.Threshold(jnp.asarray(threshold), jnp.asarray(packed_bits(flipped)))
    scale = jnp.asarray(2.0 ** rng.integers(-2, 3, features), jnp.float32)
    affine = ops.Affine(scale, jnp.ones(features), relu=False)
    run = functools.partial(
        ops.real_conv, real.images, real.kernel, **case.options, backend="cpu"
    )
    for y in on_every_instruction_set(lambda: run(ops.Sums())).values():
        np.testing.assert_array_equal(y, acc)  # small integers: exact in any order
    for y in on_every_instruction_set(lambda: run(affine)).values():
        np.testing.assert_array_equal(y, acc * np.asarray(scale) + 1)
    for y in on_every_instruction_set(lambda: run(compare).words).values():
        np.testing.assert_array_equal(y, packed_bits((acc < threshold) ^ flipped))


@given(rows=st.integers(1, 5), channels=st.integers(1, 130), seed=st.integers(0, 99))
def test_signs_on_every_instruction_set(rows, channels, seed):
    rng = np.random.default_rng(seed)
    special = np.array([0.0, -0.0, 1e-42, -1e-42, -np.inf, np.inf, -1e-37], np.float32)
    x = rng.choice(special, (rows, channels))
    negative = x < np.float32(
        -1.1e-38
    )  # subnormal numbers count as 0, as in XLA on CPU
    for y in on_every_instruction_set(
        lambda: ops.sign_bits(x, backend="cpu").words
    ).values():
        np.testing.assert_array_equal(y, packed_bits(negative))


@given(
    channels=st.integers(1, 70),
    size=st.integers(2, 9),
    window=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_sum_pool_matches_xla_on_every_instruction_set(channels, size, window, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(2, size, size + 1, channels)), jnp.float32)
    compare = ops.Threshold(
        jnp.asarray(rng.normal(size=channels), jnp.float32),
        jnp.asarray(packed_bits(rng.random(channels) < 0.5)),
    )
    options = {"window": window, "strides": 2, "padding": window // 2}
    expected = ops.sum_pool_bits(x, compare, **options, backend="xla").words
    for y in on_every_instruction_set(
        lambda: ops.sum_pool_bits(x, compare, **options, backend="cpu").words
    ).values():
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("length", [31, 992, 993, 100_000])
def test_largest_accumulator_values_are_exact(length, sign):
    a = jnp.ones((3, length))
    b = jnp.full((length, 5), float(sign))
    for y in on_every_instruction_set(
        lambda: ops.binary_matmul(a, b, backend="cpu")
    ).values():
        assert (y == sign * length).all()


def test_vmap_over_images_kernels_and_both():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 2, 5, 5, 40)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(3, 3, 3, 40, 35)), jnp.float32)
    conv = functools.partial(ops.binary_conv, strides=1, padding=1)
    for axes in [(0, None), (None, 0), (0, 0)]:
        args = [
            a if axis == 0 else a[0] for a, axis in zip((x, kernels), axes, strict=True)
        ]
        results = [
            jax.vmap(functools.partial(conv, backend=backend), axes)(*args)
            for backend in ("cpu", "float")
        ]
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("backend", ops.available_backends())
def test_vmap_over_an_empty_axis(backend):
    conv = functools.partial(ops.binary_conv, strides=1, padding=1, backend=backend)
    kernel = jnp.ones((3, 3, 40, 5))
    y = jax.vmap(lambda x: conv(x, kernel))(jnp.ones((0, 2, 5, 5, 40)))
    assert (y.shape, y.dtype) == ((0, 2, 5, 5, 5), jnp.int32)


def test_nonfinite_values_leave_unused_bits_zero():
    rng = np.random.default_rng(0)
    x = np.array([1, np.inf, -np.inf, np.nan], np.float32)[
        rng.integers(0, 4, (2, 7, 7, 3))
    ]
    compare = ops.Threshold(jnp.zeros(40), jnp.asarray([5, 0xFFFFFFFF], jnp.uint32))
    options = {"strides": 1, "padding": 0}
    kernel = jnp.asarray(rng.integers(1, 3, (1, 1, 3, 40)), jnp.float32)
    runs = [
        lambda backend: ops.real_conv(x, kernel, compare, **options, backend=backend),
        lambda backend: ops.sum_pool_bits(
            jnp.tile(jnp.asarray(x), 14)[..., :40],
            compare,
            window=1,
            **options,
            backend=backend,
        ),
    ]
    for run in runs:
        expected = np.asarray(run("xla").words) & np.array(
            [0xFFFFFFFF, 0xFF], np.uint32
        )
        for y in on_every_instruction_set(lambda run=run: run("cpu").words).values():
            np.testing.assert_array_equal(y, expected)


PROGRAM = """
import hashlib, os, sys
cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]
os.sched_setaffinity(0, cores)
import jax, numpy as np
from xnor_jax import ops
rng = np.random.default_rng(0)
x, kernel = rng.normal(size=(5, 30, 30, 70)), rng.normal(size=(3, 3, 70, 90))
real = rng.normal(size=(5, 30, 30, 7)), rng.normal(size=(5, 5, 7, 90))
x, kernel, *real = (a.astype(np.float32) for a in (x, kernel, *real))
y = ops.binary_conv(x, kernel, strides=1, padding=1, backend="cpu")
z = ops.real_conv(*real, ops.Sums(), strides=1, padding=2, backend="cpu")
data = np.asarray(y).tobytes() + np.asarray(z).tobytes()
print(len(cores), hashlib.sha256(data).hexdigest())
"""


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(cores)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "XLA_FLAGS": ""},
        ).stdout.split()
        for cores in (1, 2)
    ]
    assert [cores for cores, _ in outputs] == ["1", "2"]
    assert outputs[0][1] == outputs[1][1]


def test_environment_forces_an_instruction_set():
    program = "from xnor_jax.ops import cpu; print(cpu.instruction_set())"
    for name, status in [("portable", 0), ("altivec", 1)]:
        completed = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "XNOR_JAX_INSTRUCTION_SET": name},
        )
        assert completed.returncode == status
        assert name in (completed.stderr if status else completed.stdout)
    assert "expected one of " in completed.stderr and ", portable" in completed.stderr
    with pytest.raises(ValueError, match="'altivec' is not available"):
        cpu.use_instruction_set("altivec")


def test_chain_matches_separate_operations():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    flip = lambda n: jnp.asarray(packed_bits(rng.random(n) < 0.5))  # noqa: E731
    unit = (1, 1)
    geometries = [
        Geometry((20, 20), (5, 5), (2, 1), ((2, 2), (1, 2)), unit),
        Geometry((10, 19), (3, 3), unit, (unit, unit), unit),
        Geometry((10, 19), (2, 2), (2, 1), ((0, 0), (1, 0)), unit),
    ]
    pool = {"window": (2, 2), "strides": (2, 1), "padding": ((0, 0), (1, 0))}
    real, kernel = normal(5, 5, 3, 40), ops.pack_kernel(normal(3, 3, 40, 70))
    dense = ops.pack_kernel(normal(70, 70))
    first, third = (ops.Threshold(normal(n), flip(n)) for n in (40, 70))
    second = ops.Affine(normal(70), normal(70), relu=True)
    x = normal(3, 20, 20, 3)

    def separate(x):
        y = ops.real_conv(x, real, first, **geometries[0].options, backend="cpu")
        y = ops.packed_conv(y, kernel, second, **geometries[1].options, backend="cpu")
        y = ops.sum_pool_bits(y, third, **pool, backend="cpu")
        y = ops.packed_matmul(y, dense, second, backend="cpu")
        return ops.packed_matmul(ops.sign_bits(y), dense, second, backend="cpu")

    chain = [
        operations.real_conv(real, first, geometries[0]),
        operations.conv(kernel, second, geometries[1]),
        operations.sum_pool_bits(third, geometries[2]),
        operations.conv(dense, second),
        operations.pack(),
        operations.conv(dense, second),
    ]

    def chained(x):
        return cpu.run(x, chain, (5, 19), 70, jnp.float32)

    for y in on_every_instruction_set(lambda: chained(x)).values():
        np.testing.assert_allclose(y, separate(x), rtol=1e-5, atol=1e-4)
    stacked = jax.vmap(chained)(jnp.stack([x, -x]))
    np.testing.assert_array_equal(stacked[0], chained(x))
    np.testing.assert_array_equal(stacked[1], chained(-x))
    # Many images run through the chain in chunks; the last one is smaller.
    images = normal(101, 20, 20, 3)
    chunks = jnp.concatenate(
        [chained(images[:60]), chained(images[60:63]), chained(images[63:])]
    )
    np.testing.assert_array_equal(chained(images), chunks)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 18, 32, 37, 64, 70])
def test_pack_flags_gives_words_for_each_flag(channels):
    flags = np.random.default_rng(channels).integers(0, 256, (3, 5, channels), np.uint8)
    for count in (1, 2, 3, 8):
        words = cpu.run(
            jnp.asarray(flags),
            [operations.pack_flags(count)],
            (5,),
            count * words_for(channels) * 32,
            jnp.uint32,
        )
        for bit, plane in enumerate(np.split(words, count, axis=-1)):
            bits = unpack_negative(jnp.asarray(plane), channels)
            np.testing.assert_array_equal(bits, flags >> bit & 1)
            np.testing.assert_array_equal(plane, pack_negative(bits))


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 3), (300, 20), (5, 9, 9, 67), (3, 40, 40, 129), (2, 20_000)]
)
def test_channel_sums_match_float64(shape):
    """Shapes with few rows or many tasks, with whole vectors or a remainder."""
    rng = np.random.default_rng(len(shape))
    a, x = (np.float32(rng.normal(size=shape)) for _ in range(2))
    x += 100  # products without the center would lose digits
    center = np.float32(rng.normal(100, 0.1, shape[-1]))
    axes = tuple(range(len(shape) - 1))
    products = np.float64(a) * (np.float64(x) - center)
    expected = [np.float64(a).sum(axes), products.sum(axes)]
    magnitude = [abs(np.float64(a)).sum(axes), abs(products).sum(axes)]

    def sums():
        return cpu.channel_sums(*map(jnp.asarray, (a, x, center)))

    for found in on_every_instruction_set(sums).values():
        assert (abs(found - expected) <= 1e-6 * np.array(magnitude) + 1e-6).all()
