"""Functions of a user's in a backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def hoist(
    function: Callable[..., jax.Array], *args: Any
) -> tuple[Callable[..., jax.Array], Sequence[Any]]:
    """Turn the arrays that a function closes over into arguments.

    The backward pass of a `jax.custom_vjp` is traced later than the forward pass: a
    tracer that it closed over, such as a schedule's value in a step, would have leaked.

    Args:
      function: A function of arrays that returns one array.
      *args: Arrays of the shapes and dtypes that it will be called with.

    Returns:
      `pure` and `consts`, with `pure(consts, *args) == function(*args)`.
    """
    # Not jax.closure_convert, which leaves integers, such as a step's number, in place.
    closed = jax.make_jaxpr(function)(*args)

    def pure(consts: Sequence[Any], *args: jax.Array) -> jax.Array:
        return jax.core.eval_jaxpr(closed.jaxpr, consts, *args)[0]

    return pure, closed.consts
