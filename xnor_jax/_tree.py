"""Apply a function to the masked leaves of a pytree, with errors that name the leaf."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from xnor_jax._kernel import describe

# A bool tree of the parameters' structure, a prefix of it, a callable that makes one
# from the parameters, or None for every leaf: as in optax.
Mask = Any


def resolve_mask(who: str, mask: Mask, params: Any) -> Any:
    """Return `mask` as a full bool tree of the structure of `params`.

    Args:
      who: The calling function, for the error.
      mask: A bool tree, a prefix of one, a callable `params -> bool tree`, or None.
      params: Any pytree.

    Raises:
      ValueError: If the mask has a leaf that fits no leaf of `params`.
      TypeError: If a leaf of the mask is not a static bool.
    """
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    # A leaf: a pytree may be callable too, such as an Equinox module of bools.
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    # Without the boxes of NNX variables the mask is a prefix of a state with them and
    # of one without, as `nnx.Optimizer` hands to a chain.
    mask = jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if _is_box(node) else node,
        mask,
        is_leaf=_is_box,
    )
    for path, leaf in jax.tree.leaves_with_path(mask):
        if (
            getattr(leaf, "dtype", type(leaf)) not in (bool, np.dtype(bool))
            or getattr(leaf, "shape", ()) != ()
        ):
            raise TypeError(
                f"{who}: expected a mask of bools, got {describe(leaf)}"
                f"{_at(path)} of the mask"
            )
        if isinstance(leaf, Tracer):
            raise TypeError(
                f"{who}: the mask must be static, got a traced value{_at(path)} of the "
                "mask; close over it instead of passing it through jit"
            )
    try:
        full = jax.tree.broadcast(mask, params)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{who}: the mask fits no leaf of params{_first_misfit(mask, params)}; "
            "expected a bool tree of the structure of params, or a prefix of it"
        ) from error
    return jax.tree.map(bool, full)


def map_kernels(
    who: str, fn: Callable[..., Any], mask: Mask, params: Any, *rest: Any
) -> Any:
    """Map `fn` over the leaves of `params` (and `rest`) that `mask` selects.

    Every other leaf of the first tree of `rest`, or of `params` where `rest` is empty,
    is returned as it is. A `ValueError` or `TypeError` from `fn` gets the caller's name
    and the path of the leaf.
    """

    def visit(path, selected, kernel, *others):
        if not selected:
            return others[0] if others else kernel
        return named(who, path, fn, kernel, *others)

    return jax.tree.map_with_path(visit, resolve_mask(who, mask, params), params, *rest)


def named(who: str, path: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """Call `fn(*args)`; errors of value and type carry `who` and the leaf's path."""
    try:
        return fn(*args)
    except (ValueError, TypeError) as error:
        # A subclass, such as JAX's tracer errors, may not take a plain message.
        if type(error) is not ValueError and type(error) is not TypeError:
            raise
        what, semicolon, mend = str(error).partition("; ")
        message = f"{who}: {what}{_at(path)}{semicolon}{mend}"
        raise type(error)(message) from error


def _is_box(node: Any) -> bool:
    paths = jax.tree.leaves_with_path(node)
    return len(paths) == 1 and paths[0][0] == (jax.tree_util.GetAttrKey("value"),)


def _at(path: Any) -> str:
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def _first_misfit(mask: Any, params: Any) -> str:
    known = [path for path, _ in jax.tree.leaves_with_path(params)]
    for path, _ in jax.tree.leaves_with_path(mask):
        if not any(leaf[: len(path)] == path for leaf in known):
            return f" (its leaf{_at(path)})"
    covered = [path for path, _ in jax.tree.leaves_with_path(mask)]
    for leaf in known:
        if not any(leaf[: len(path)] == path for path in covered):
            return f" (it has none for {jax.tree_util.keystr(leaf)})"
    return ""
