"""Gradients computed by a user-defined function."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.core import eval_jaxpr


def transform_gradient(
    function: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    """Return `x`; its incoming gradient `g` continues as `function(x, g)`.

    Args:
      function: `(x, grad) -> grad`, in the shape and dtype of `x`. It may close over
        traced arrays, which get no gradient.
      x: Any floating array.
    """
    # The backward pass is traced after the forward pass, when tracers in the closure
    # may be invalid: closed-over values become arguments. jax.closure_convert would
    # not hoist integers, such as a step number.
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
