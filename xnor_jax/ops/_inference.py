"""Inference only: what may go in, and the refusal of a gradient."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from xnor_jax._kernel import describe

T = TypeVar("T")


def no_gradient(where: str, tree: T) -> T:
    """The same tree, from which a gradient raises: integers would give a silent zero.

    Args:
      where: The public function's name, for the error.
      tree: A pytree; only its floating leaves matter.

    Returns:
      The tree. Differentiating what is computed from it raises a TypeError.
    """

    def guard(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return _guarded(where, leaf)

    return jax.tree.map(guard, tree)


def check_floating(where: str, name: str, x: Any) -> jax.Array:
    """The argument as an array of real floating dtype.

    Raises:
      TypeError: If it is of another dtype.
    """
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{where}: expected floating point numbers in {name}, got {describe(x)}"
        )
    return x


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _guarded(where: str, x: jax.Array) -> jax.Array:
    return x


@_guarded.defjvp
def _guarded_jvp(where, primals, tangents):
    raise TypeError(
        f"{where}: has no gradient, it is for inference; train with xnor_jax.nn, or "
        "give it one with jax.custom_vjp"
    )
