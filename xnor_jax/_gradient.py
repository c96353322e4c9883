"""Gradients that a function of the user's computes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.core import eval_jaxpr


def transform_gradient(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """`x` itself; the gradient `g` that arrives at it goes on as `function(x, g)`.

    Args:
      function: `(x, grad) -> grad`, in the shape and dtype of `x`. It may close over
        traced arrays, to which no gradient goes.
      x: Any floating array.
    """
    # The backward pass is traced later than the forward pass, when a tracer in the
    # closure may be dead: what the function closes over becomes an argument. Not by
    # jax.closure_convert, which leaves integers, such as a step's number, in place.
    closed = jax.make_jaxpr(function)(x, x)
    return _transform(closed.jaxpr, tuple(closed.consts), x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transform(jaxpr: Any, consts: tuple[Any, ...], x: jax.Array) -> jax.Array:
    return x


def _transform_fwd(jaxpr, consts, x):
    return x, (consts, x)


def _transform_bwd(jaxpr, residuals, g):
    consts, x = residuals
    return None, eval_jaxpr(jaxpr, consts, x, g)[0]


_transform.defvjp(_transform_fwd, _transform_bwd)
