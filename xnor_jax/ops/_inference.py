"""Checks of inference-only operations: dtypes, and an error when differentiated."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from xnor_jax._kernel import describe

T = TypeVar("T")


def no_gradient(where: str, tree: T) -> T:
    """Guard a tree against differentiation: integers would give silent zero gradients.

    Args:
      where: The public function's name, for the error.
      tree: A pytree; only its floating leaves are guarded.

    Returns:
      The tree. Differentiating anything computed from it raises a TypeError.
    """

    def guard(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return _guarded(where, leaf)

    return jax.tree.map(guard, tree)


def check_floating(where: str, name: str, x: Any) -> jax.Array:
    """Convert an argument to an array and check that its dtype is real floating.

    Raises:
      TypeError: If it has another dtype.
    """
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{where}: expected a floating point {name}, got {describe(x)}")
    return x


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guarded(where: str, x: jax.Array) -> jax.Array:
    return x


@_guarded.defjvp
def _guarded_jvp(where, primals, tangents):
    raise TypeError(
        f"{where}: is for inference and has no gradient; train with xnor_jax.nn, or "
        "define one with jax.custom_vjp"
    )
