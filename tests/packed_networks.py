"""Helpers for tests of packed networks: odd networks and edge-case parameters."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import xnor_jax as xnor
from xnor_jax import masks, ops
from xnor_jax.nn import AvgPool, Flatten, GlobalAveragePool, MaxPool
from xnor_jax.packing import graph


class Net(xnor.nn.Layered):
    """A network of the given layers."""

    def __init__(self, image_shape, *runs: Any):
        self.image_shape = image_shape
        self.runs = nnx.List(runs)

    def layers(self):
        return tuple(self.runs)


def block(*features: Any, rngs=None, **options: Any) -> xnor.nn.XnorBlock:
    return xnor.nn.XnorBlock(*features, rngs=rngs or nnx.Rngs(0), **options)


def conv(*features: Any, **options: Any) -> nnx.Conv:
    return nnx.Conv(*features, rngs=nnx.Rngs(0), **options)


def linear(*features: Any, **options: Any) -> nnx.Linear:
    return nnx.Linear(*features, rngs=nnx.Rngs(0), **options)


def norm(features: int, **options: Any) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, rngs=nnx.Rngs(0), **options)


def signals():
    """Rank 1; BatchNorm over flattened features cannot fold into channel thresholds."""
    return Net(
        (23, 3),
        conv(3, 40, 5, padding="CAUSAL"),
        block(40, 37, 3, strides=2, padding="SAME"),
        MaxPool(3, 3),
        AvgPool(2, 1),
        block(37, 12, 1),
        Flatten(),
        block(36, 20),
        linear(20, 3),
    )


def volumes():
    """Rank 3."""
    return Net(
        (4, 5, 3, 2),
        conv(2, 33, (2, 2, 2)),
        MaxPool(2, 1),
        block(33, 34, (1, 2, 2)),
        GlobalAveragePool(),
        linear(34, 3),
    )


def tiny():
    """A network for 6×5 grey images and 3 classes."""
    return Net(
        (6, 5, 1),
        conv(1, 33, (3, 3)),
        block(33 * 6 * 5, 20, norm_features=33),
        linear(20, 3),
    )


def randomized(
    model: Any, seed: int = 0, *, exact: bool = False, masked: Sequence[str] = ()
) -> Any:
    """Set random parameters and statistics, and evaluation mode.

    Args:
      model: Changed in place.
      seed: The seed of the values.
      exact: Draw values of few binary digits: sums are exact in any order, BatchNorms
        often return exactly 0, and some channels have extreme scales.
      masked: Paths of kernels of Flax layers that a mask makes binary.
    """
    rng = np.random.default_rng(seed)
    real = {
        "/".join(map(str, (*path, "kernel")))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv | nnx.Linear)
        or not getattr(module, "binary", True)
    } - {*masked}

    def draw(path, leaf):
        name, shape = masks.path_string(path), leaf.shape
        if name.endswith("kernel"):
            value = _exact_kernel(rng, shape) if exact else rng.normal(size=shape) / 4
            if exact and name in real:  # several magnitudes: not binary
                value = value * rng.choice([0.5, 1, 2], shape)
        elif name.endswith("var"):
            # Not exact even if `exact`: the root only scales.
            value = rng.uniform(0.2, 2, shape)
        elif name.endswith("mean") or name.endswith("bias"):
            value = rng.integers(-6, 7, shape) / 2 if exact else rng.normal(size=shape)
        else:
            value = rng.normal(size=shape)
        if exact and name.endswith("scale"):
            odd = [0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1e-42, -2.5, 1e38]
            at = rng.permutation(shape[0])[: len(odd)]
            value[at] = odd[: len(at)]
        if exact and name.endswith("norm/bias"):
            value[rng.random(shape) < 0.5] = 0
        return jnp.asarray(value, jnp.float32)

    for kind in (nnx.Param, nnx.BatchStat):
        state = nnx.state(model, kind)
        nnx.update(model, jax.tree.map_with_path(draw, state))
    model.eval()
    return model


def _exact_kernel(rng, shape):
    value = rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.integers(-3, 0, shape[-1])
    value[..., rng.integers(shape[-1])] = 0
    return value


def images(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).integers(-4, 5, shape))


def float_signs(model: Any, x: jax.Array) -> tuple[list[jax.Array], list, jax.Array]:
    """Return the input signs and sums of each binary layer, and the logits."""
    signs, sums = [], []

    def recorded(then):
        def record(layer, x, *, relu):
            if layer.binary:
                signs.append(xnor.sign(x).reshape(len(x), -1))
                pure = nnx.clone(layer)
                pure.kernel = nnx.Param(xnor.sign(layer.kernel[...]))
                pure.bias, pure.input_scale = None, False
                sums.append(then(pure, xnor.sign(x), relu=False))
            return then(layer, x, relu=relu)

        return record

    with ExitStack() as stack:
        for layer in (xnor.nn.BinaryConv, xnor.nn.BinaryLinear):
            patched = mock.patch.object(layer, "then", recorded(layer.then))
            stack.enter_context(patched)
        return signs, sums, model(x)


def packed_signs(packed: Any, x: jax.Array) -> tuple[list[jax.Array], list, jax.Array]:
    """Return the same for a packed network."""
    signs, sums = [], []
    values: list[Any] = [x]
    for node in packed.nodes:
        args = [values[i] for i in node.inputs]
        if isinstance(node, graph.BinaryConv):
            (bits,) = args
            unpacked = ops.unpack_bits(bits.words, bits.size)
            signs.append(unpacked.reshape(len(unpacked), -1))
            sums.append(_sums(node, bits, packed.backend))
        values.append(node(args, packed.backend))
    return signs, sums, values[-1]


def _sums(node: graph.BinaryConv, bits: ops.Bits, backend: str) -> Any:
    kernel = node.arrays["kernel"]
    if not node.window:
        return ops.packed_matmul(bits, kernel, ops.Sums(), backend=backend)
    return ops.packed_conv(
        bits,
        kernel,
        ops.Sums(),
        **node.geometry,
        groups=node.groups,
        backend=backend,
    )


def check_equal(model: Any, packed: Any, x: jax.Array) -> None:
    """Check that signs and sums are equal, and logits equal to rounding."""
    graphdef, state = nnx.split(model)
    signs, sums, logits = jax.jit(
        lambda state, x: float_signs(nnx.merge(graphdef, state), x)
    )(state, x)
    got_signs, got_sums, got = jax.jit(packed_signs)(packed, x)
    assert len(signs) == len(got_signs) > 0
    for wanted, found in zip(signs, got_signs, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert 0.02 < (np.asarray(wanted) < 0).mean() < 0.98
    for wanted, found in zip(sums, got_sums, strict=True):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, np.asarray(wanted).reshape(found.shape))
    scale = float(jnp.abs(logits).max())
    assert scale > 0
    # Node by node, then in the network's own call.
    for found in (got, packed(x), packed.with_backend("auto")(x)):
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4 * scale)
