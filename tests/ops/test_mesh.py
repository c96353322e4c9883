"""Layers and operations on a mesh's Explicit axes, compared with one device."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import xnor_jax as xnor
from xnor_jax import ops

assert jax.device_count() == 4
mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Explicit,))
rng = np.random.default_rng(0)
IMAGES = jnp.asarray(rng.normal(size=(8, 6, 5, 40)), jnp.float32)
KERNEL = jnp.asarray(rng.normal(size=(3, 3, 40, 32)), jnp.float32)


def check(function, close, spec=P("batch")):
    wanted = function(IMAGES)
    with jax.set_mesh(mesh):
        found = function(jax.device_put(IMAGES, NamedSharding(mesh, spec)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if close:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)
    return jax.typeof(jax.tree.leaves(found)[0]).sharding.spec


def trained(layer):
    graphdef, state = nnx.split(layer)

    def loss(state, x):
        y = nnx.merge(graphdef, state)(x)
        return (y**2).mean(), y

    @jax.jit
    def step(state, x):
        (_, y), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(state, x)
        return y, gradients

    return lambda x: step(state, x)


def layers(backend):
    options = {"backend": backend, "rngs": nnx.Rngs(0)}
    window = (40, 33, (3, 3))
    yield xnor.nn.BinaryConv(*window, **options)
    yield xnor.nn.BinaryConv(*window, binary=False, **options)
    yield xnor.nn.BinaryConv(*window, compute_dtype=jnp.bfloat16, **options)
    yield xnor.nn.BinaryConv(*window, input_scale=True, **options)
    yield xnor.nn.BinaryLinear(40, 33, **options)
    yield xnor.nn.XnorBlock(*window, **options)
    yield xnor.nn.XnorBlock(40, 33, (1, 1), **options)


for backend in ("auto", "float"):
    for layer in layers(backend):
        assert check(trained(layer), close=True)[0] == "batch"
    check(trained(next(layers(backend))), close=True, spec=P())
pools = [xnor.nn.MaxPool(2, 2), xnor.nn.AvgPool(3, 2, 1), xnor.nn.GlobalAveragePool()]
for pool in pools:
    step = trained(nnx.Sequential(pool))
    assert check(step, close=True)[0] == "batch"

options = {"strides": 1, "padding": "SAME"}
affine = ops.Affine(jnp.ones(32), jnp.ones(32))
flip = jnp.zeros(2, jnp.uint32)
pool = {"window": 2, "strides": 2, "padding": 0}
packed, dense = ops.pack_kernel(KERNEL), ops.pack_kernel(KERNEL[0, 0])
for name in ("auto", *ops.available_backends()):
    b = {"backend": name}
    for function in (
        lambda x: ops.binary_conv(x, KERNEL, **options, **b),
        lambda x: ops.binary_matmul(x, KERNEL[0, 0], **b),
        lambda x: ops.packed_conv(
            ops.sign_bits(x, **b), packed, affine, **options, **b
        ),
        lambda x: ops.packed_matmul(ops.sign_bits(x, **b), dense, ops.Sums(), **b),
        lambda x: ops.pool_bits(ops.sign_bits(x, **b), flip, **pool),
        lambda x: ops.sum_pool_bits(x, ops.Threshold(jnp.ones(40), flip), **pool, **b),
    ):
        assert check(function, close=False)[0] == "batch"
    check(lambda x: ops.real_conv(x, KERNEL, ops.Sums(), **options, **b), close=True)
print("done")
"""


@pytest.mark.slow
def test_explicit_sharding_matches_one_device(monkeypatch):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-3000:]
