"""Binary layers with edge-case values, and their results by NumPy loops."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import reference_loop as loop
from flax import nnx

import xnor_jax as xnor


def quadratic_rule(kernel: Any, grad: Any):
    """A user-defined rule for both NumPy and JAX arrays."""
    return grad * (1 + 3 * kernel**2)


RULES = {**loop.RULES, "of the user": quadratic_rule}

# Odd sizes; strides, dilation and padding that differ by axis and side.
CONVS: dict[str, dict[str, Any]] = {
    "rank 1": {"kernel_size": 3, "strides": 2, "kernel_dilation": 2, "padding": 1},
    "rank 2": {
        "kernel_size": (3, 2),
        "strides": (2, 1),
        "kernel_dilation": (1, 3),
        "padding": ((0, 2), (2, 1)),
    },
    "rank 3": {"kernel_size": (2, 3, 2), "padding": (1, 0, 2)},
    "same": {"kernel_size": (3, 4), "strides": 2, "padding": "SAME"},
    "valid": {"kernel_size": [3, 2], "padding": "VALID"},
    "groups": {
        "kernel_size": (3, 3),
        "in_features": 6,
        "feature_group_count": 2,
        "padding": 1,
    },
    "1×1": {"kernel_size": (1, 1), "strides": (1, 2)},
    "XLA": {"kernel_size": (5, 5), "in_features": 21, "padding": 2},
}


class Case:
    """A `BinaryConv` and an input with edge-case values; results by NumPy loops."""

    def __init__(self, name: str, **options: Any):
        rng = np.random.default_rng(len(name))
        options = {"in_features": 5, "out_features": 4, **CONVS[name], **options}
        options["kernel_init"] = numpy_normal
        layer = xnor.nn.BinaryConv(**options, rngs=nnx.Rngs(0))
        window = layer.kernel_size
        spatial = (5, 6, 4)[: len(window)]
        self.layer = layer
        self.kernel = awkward(rng, layer.kernel.shape)
        self.x = awkward(rng, (3, *spatial, layer.in_features))
        layer.kernel[...] = jnp.float32(self.kernel)
        self.bias = np.zeros(layer.out_features)
        if layer.bias is not None:
            self.bias = rng.normal(size=layer.out_features)
            layer.bias[...] = jnp.float32(self.bias)

        strides, dilation, padding = (
            layer.strides,
            layer.kernel_dilation,
            options.get("padding", "SAME"),
        )
        if padding == "SAME":
            pads = loop.same_pads(spatial, window, strides, dilation)
        elif padding == "VALID":
            pads = ((0, 0),) * len(window)
        else:
            sides = (padding,) * len(window) if isinstance(padding, int) else padding
            pads = tuple((p, p) if isinstance(p, int) else p for p in sides)
        self.geometry = strides, pads, dilation
        self.groups = layer.feature_group_count
        self.sums = loop.conv(
            loop.sign(self.x), loop.sign(self.kernel), *self.geometry, self.groups
        )
        self.g = rng.normal(size=self.sums.shape)

    def gradients(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradients for the signs and for the binarized kernel."""
        signs, binarized = loop.sign(self.x), loop.binarize(self.kernel)
        return loop.conv_gradients(signs, binarized, g, *self.geometry, self.groups)


def awkward(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw float32 values as float64: a third beyond ±1, some at 0, ±1 or near ±1."""
    values = rng.normal(size=shape).astype(np.float32).astype(np.float64)
    edges = np.resize(
        [1.0, -1.0, 0.0, 1 - 2**-24, -1 - 2**-23], max(1, values.size // 9)
    )
    values.flat[rng.choice(values.size, edges.size, replace=False)] = edges
    return values


def numpy_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key  # Drawing with NumPy saves one compilation per shape.
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


call = nnx.jit(lambda module, x: module(x))  # Ten times as fast as op by op.


def forward_and_gradients(layer: nnx.Module, x: np.ndarray, g: np.ndarray, dtype=None):
    """`y`, then the pullback of `g` to the parameters and to `x`, in one program."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    dtype = dtype or jnp.float32
    x, g = jnp.asarray(x, dtype), jnp.asarray(g, dtype)
    after, *results = run_forward_and_gradients(graph, params, rest, x, g)
    nnx.update(layer, after)
    return results


@partial(jax.jit, static_argnums=0)
def run_forward_and_gradients(graph, params, rest, x, g):
    def forward(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(x), nnx.state(model, nnx.Not(nnx.Param))

    y, pullback, after = jax.vjp(forward, params, x, has_aux=True)
    return after, y, *pullback(g.astype(y.dtype))


def assert_close(actual, expected, tolerance=3e-5):
    expected = np.asarray(expected)
    size = np.abs(expected).max(initial=1e-30)
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * size)


def rngs() -> nnx.Rngs:
    # The default generator takes a second to compile for each shape.
    return nnx.Rngs(jax.random.key(0, impl="rbg"))


def linear(c: int, c_out: int, **options: Any) -> xnor.nn.BinaryLinear:
    options = {"kernel_init": numpy_normal, **options}
    return xnor.nn.BinaryLinear(c, c_out, **options, rngs=rngs())


def conv(c: int, c_out: int, window: Any = (3, 3), **options: Any):
    options = {"kernel_init": numpy_normal, **options}
    return xnor.nn.BinaryConv(c, c_out, window, **options, rngs=rngs())


def randomize(module: nnx.Module, seed: int) -> None:
    """Give each parameter and statistic random values; variances above 0."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, (nnx.Param, nnx.BatchStat))

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape)
        positive = any("var" in str(key) for key in path)
        return jnp.asarray(np.exp(value) if positive else value, leaf.dtype)

    nnx.update(module, jax.tree.map_with_path(draw, state))
