"""A small network as each kind of tree; its second layer is binary."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen, nnx
from oracles import random_kernel


def nested_dict():
    return {
        "first": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "binary": [{"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones(5)}],
        "last": {"kernel": jnp.ones((5, 2))},
    }


def nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.binary = nnx.List([nnx.Conv(4, 5, (3,), rngs=rngs)])
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.last = nnx.Linear(5, 2, rngs=rngs)

    return nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)


def linen_dict():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4, name="first")(x)
            x = linen.Dense(5, name="binary")(x)
            return linen.Dense(2, name="last")(x)

    return jax.eval_shape(Net().init, jax.random.key(0), jnp.ones((1, 3)))["params"]


class _Layer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    count: jax.Array
    activation: Callable
    stride: int = eqx.field(static=True, default=1)

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias)


class _Net(eqx.Module):
    first: _Layer
    binary: _Layer
    last: _Layer

    def __call__(self, x):
        return self.last(self.binary(self.first(x)))


def equinox_module():
    def layer(inputs, features):
        count = jnp.zeros((), jnp.int32)
        return _Layer(jnp.ones((inputs, features)), jnp.ones(features), count, jnp.tanh)

    return _Net(layer(3, 4), layer(4, 5), layer(5, 2))


def bare_array():
    return jnp.ones((3, 2, 5))


TREES = {
    "array": bare_array,
    "dict": nested_dict,
    "nnx": nnx_state,
    "linen": linen_dict,
    "equinox": equinox_module,
}


def make(kind, dtype="float32", magnitude=0.7):
    """Return a tree with random floats, and the mask of its binary kernel."""
    params = TREES[kind]()
    seeds = iter(range(100))

    def randomize(x):
        return (
            random_kernel(next(seeds), x.shape, dtype, magnitude) if is_float(x) else x
        )

    def is_binary(path, _):
        name = jax.tree_util.keystr(path)
        return not path or ("binary" in name and "kernel" in name)

    params = jax.tree.map(randomize, params)
    return params, jax.tree.map_with_path(is_binary, params)


def is_float(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
