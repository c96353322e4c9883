"""The `pallas` backend: its kernel interpreted, lowered for CUDA, and run on a GPU."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from xnor_jax import ops
from xnor_jax.geometry import Geometry
from xnor_jax.ops import pallas, xla

interpreted = partial(pallas.popcounts, interpret=True)


def words(rng, *shape):
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


@pytest.mark.slow
@given(
    rows=st.integers(0, 2 * pallas.TILE + 1),
    groups=st.integers(1, 3),
    count=st.integers(0, 40),
    columns=st.integers(0, pallas.TILE + 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_popcounts_match_numpy(rows, groups, count, columns, seed):
    rng = np.random.default_rng(seed)
    a, b = words(rng, rows, groups, count), words(rng, groups, count, columns)
    expected = np.bitwise_count(a[..., None] ^ b).sum(axis=2, dtype=np.int32)
    counts = interpreted(a, b)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_padded_convolution_matches_xla(groups):
    rng = np.random.default_rng(0)
    kernel = ops.pack_kernel(rng.normal(size=(3, 3, 40, 80)).astype("f"), groups)
    geometry = Geometry((9, 8), (3, 3), (2, 1), ((1, 1), (2, 0)), (1, 2))
    args = words(rng, 2, 9, 8, groups, 2), kernel, ops.Sums(), geometry
    expected = xla.conv_words(*args)
    np.testing.assert_array_equal(xla.conv_words(*args, interpreted), expected)


def test_programs_for_cuda_call_the_kernel():
    options = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": None}
    if "platform" in inspect.signature(AbstractDevice).parameters:  # not in JAX 0.10.0
        options["platform"] = "cuda"
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(**options))
    x, kernel = jnp.ones((2, 11, 13, 40)), jnp.ones((3, 3, 40, 70))
    run = jax.jit(partial(ops.binary_conv, strides=1, padding="SAME", backend="pallas"))
    with use_abstract_mesh(mesh):
        text = run.trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "custom_call" in line)
    assert "triton" in call
    assert "popc.b32" in call
    # 286 rows and 70 columns, in tiles of 64.
    assert "grid_x = 5 : i32, grid_y = 2 : i32, grid_z = 1 : i32" in call


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)])
def test_vmap_matches_xla_and_shares_tiles(mapped):
    rng = np.random.default_rng(0)
    a = words(rng, *([4] if mapped[0] == 0 else []), 70, 2, 3)
    b = words(rng, *([4] if mapped[1] == 0 else []), 2, 3, 5)
    run = jax.vmap(interpreted, mapped)
    expected = jax.vmap(xla.popcounts, mapped)(a, b)
    np.testing.assert_array_equal(run(a, b), expected)
    # 4 · 70 rows fill 5 tiles together; each 70 rows alone need 2.
    grid = "(5, 1, 2)" if mapped == (0, None) else "(4, 2, 1, 2)"
    assert f"grid={grid}" in str(jax.make_jaxpr(run)(a, b))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="elsewhere it is xla itself")
def test_gpu_results_match_xla():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 17, 16, 70)).astype("f")
    kernel = rng.normal(size=(3, 3, 70, 130)).astype("f")
    run = partial(ops.binary_conv, x, kernel, strides=1, padding="SAME")
    np.testing.assert_array_equal(run(backend="pallas"), run(backend="xla"))
