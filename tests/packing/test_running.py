"""Packed networks in one call of the engine: the C API's logits, bit for bit.

`.ci/run` runs this file again on a library with AddressSanitizer and UBSan.
"""

from concurrent.futures import ThreadPoolExecutor

import c_engine
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xnor_jax as xnor
from xnor_jax.ops import cpu

pytestmark = c_engine.needed


@pytest.fixture(scope="module")
def packed():
    """Real and binary products, a shortcut, permuted channels and a maximum of rows."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))  # noqa: E731
    stem, head, shift = normal(3, 3, 3, 40), normal(40, 5), normal(40)
    kernel, scale = normal(2, 3, 40, 40), normal(40)
    order = rng.permutation(40)

    def conv(x, kernel, padding):
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, None, None, axes
        )

    def function(x):
        x = jax.nn.relu(conv(x, stem, "SAME") + shift)
        y = conv(xnor.sign_ste(x - 0.3), xnor.binarize(kernel), "SAME")
        y = jnp.tanh(y * scale + shift)[..., order] * scale + x
        y = conv(xnor.sign_ste(y), xnor.binarize(kernel), ((1, 0), (0, 2)))
        return jnp.maximum(y[:, ::2], y[:, 1::2]).mean((1, 2)) @ head

    return xnor.pack(function, example=np.ones((1, 6, 5, 3), np.float32))


@pytest.fixture(scope="module")
def x():
    return np.float32(np.random.default_rng(1).normal(size=(70, 6, 5, 3)))


@pytest.fixture(scope="module")
def wanted(packed, x):
    return c_engine.Engine(c_engine.to_bytes(packed))(x)


def negated(packed):
    """The same network with its floats negated."""
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: -a if is_float(a) else a, packed)


def test_logits_match_the_c_api(packed, x, wanted):
    text = jax.jit(packed).lower(x).as_text()
    assert text.count("stablehlo.custom_call") == text.count("xnor_jax_network") == 1
    for backend in ("auto", "cpu"):
        got = packed.with_backend(backend)(x)
        np.testing.assert_array_equal(got, wanted, err_msg=backend)
    np.testing.assert_array_equal(packed(x[:3]), wanted[:3])
    np.testing.assert_allclose(packed.with_backend("xla")(x), wanted, rtol=1e-4)


def test_logits_match_on_every_instruction_set(packed, x):
    chosen = cpu.instruction_set()
    try:
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            engine = c_engine.Engine(c_engine.to_bytes(packed))
            np.testing.assert_array_equal(packed(x), engine(x), err_msg=name)
    finally:
        cpu.use_instruction_set(chosen)


def test_weights_are_arguments(packed, x, wanted):
    """One program runs with any weights in turn, also with computed ones."""
    run = jax.jit(lambda packed, x: packed(x))
    other = negated(packed)
    negated_logits = c_engine.Engine(c_engine.to_bytes(other))(x)
    assert (negated_logits != wanted).any()
    for _ in range(2):
        np.testing.assert_array_equal(run(packed, x), wanted)
        np.testing.assert_array_equal(run(other, x), negated_logits)
    computed = jax.jit(lambda packed, x: negated(packed)(x))(packed, x)
    np.testing.assert_array_equal(computed, negated_logits)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed, other)
    stacked = jax.vmap(lambda p, x: p(x), in_axes=(0, None))(both, x)
    np.testing.assert_array_equal(stacked, [wanted, negated_logits])
    pairs = jax.vmap(packed)(x.reshape(7, 10, 6, 5, 3))
    np.testing.assert_array_equal(pairs.reshape(70, -1), wanted)


def test_threads_share_one_program_with_different_weights(packed, x, wanted):
    run = jax.jit(lambda packed, x: packed(x))
    negated_logits = np.asarray(run(negated(packed), x))
    cases = [(packed, wanted), (negated(packed), negated_logits)]

    def call(index):
        weights, logits = cases[index % 2]
        return (np.asarray(run(weights, x)) == logits).all()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(64)))


def test_images_are_sharded_over_devices(packed, x, wanted):
    mesh = jax.sharding.Mesh(jax.devices()[:2], "batch")
    spec = jax.sharding.PartitionSpec("batch")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    y = packed(sharded)
    assert len(y.sharding.device_set) == 2
    np.testing.assert_array_equal(y, wanted)
    mapped = jax.shard_map(packed, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(jax.jit(mapped)(x), wanted)


def test_concatenation_of_nine_inputs_runs(x):
    """Nine concatenated values; a node has at most eight inputs."""
    kernel = np.float32(np.random.default_rng(2).normal(size=(27, 4)))

    def function(x):
        x = x.reshape(x.shape[0], -1)
        signs = [
            xnor.sign_ste(x[:, start : start + 3] - start / 9) for start in range(9)
        ]
        return jnp.concatenate(signs, -1) @ xnor.binarize(kernel)

    packed = xnor.pack(function, example=x[:2])
    engine = c_engine.Engine(c_engine.to_bytes(packed))
    np.testing.assert_array_equal(packed(x), engine(x))
    np.testing.assert_allclose(packed(x), jax.jit(function)(x), rtol=1e-5, atol=1e-5)
