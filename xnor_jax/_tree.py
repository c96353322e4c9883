"""Apply a function to the masked leaves of a pytree, with errors that name the leaf."""

import re
from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from xnor_jax._kernel import check_kernel, describe

# A bool tree with the parameters' structure, a prefix of one, a callable that returns
# one for the parameters, or None for every leaf: as in optax.
Mask = Any


def resolve_mask(who: str, mask: Mask, params: Any) -> Any:
    """Return `mask` as a full bool tree with the structure of `params`.

    Args:
      who: The calling function, for error messages.
      mask: A bool tree, a prefix of one, a callable `params -> bool tree`, or None.
      params: Any pytree.

    Raises:
      ValueError: If the mask is not a prefix of `params`.
      TypeError: If a leaf of the mask is not a static bool scalar.
    """
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    # Only a leaf is called: a pytree may be callable too, such as an Equinox module.
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    # Without NNX variables the mask is a prefix of a state with variables and of one
    # without, which `nnx.Optimizer` passes to a chain.
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
            f"{who}: the mask does not match params{_first_misfit(mask, params)}; "
            "expected a bool tree of the structure of params, or a prefix of it"
        ) from error
    return jax.tree.map(bool, full)


def map_leaves(
    who: str, fn: Callable[..., Any], mask: Mask, params: Any, *rest: Any
) -> Any:
    """Map `fn` over the leaves of `params` (and `rest`) that `mask` selects.

    The other leaves of the first tree of `rest`, or of `params` if `rest` is empty, are
    returned unchanged. A `ValueError` or `TypeError` from `fn` is raised again with the
    caller's name and the path of the leaf.
    """

    def visit(path, selected, leaf, *others):
        if not selected:
            return others[0] if others else leaf
        return named(who, path, fn, leaf, *others)

    return jax.tree.map_with_path(visit, resolve_mask(who, mask, params), params, *rest)


def map_kernels(
    who: str,
    fn: Callable[..., Any],
    mask: Mask,
    params: Any,
    *rest: Any,
    centred: bool = False,
) -> Any:
    """Map `fn` over kernels `[..., C_in, C_out]`: `map_leaves` with checks.

    The leaves beside a kernel show its layout. A bias `[C_out]` confirms it. A bias
    `[*stack, C_out]` beside a kernel `[*stack, ..., C_in, C_out]`, as `nnx.vmap` and
    `nn.scan` create them, marks a stack of kernels: `fn` is mapped over its leading
    axes. Other layouts are rejected where they show: a bias of another shape, or the
    projections of an attention layer.

    Args:
      who: The calling function, for error messages.
      fn: Called with one kernel and its counterparts in `rest`.
      mask: The kernels; None for every leaf.
      params: Any pytree.
      *rest: Trees of the same structure.
      centred: Whether `fn` centres the kernel, which needs two input channels.
    """
    shapes = {
        path_string(path): getattr(leaf, "shape", None)
        for path, leaf in jax.tree.leaves_with_path(params)
    }

    def visit(path, selected, kernel, *others):
        if not selected:
            return others[0] if others else kernel
        stack = named(
            who, path, _check, kernel, path_string(path), shapes, centred=centred
        )
        mapped = fn
        for _ in range(stack):
            mapped = jax.vmap(mapped)
        return named(who, path, mapped, kernel, *others)

    return jax.tree.map_with_path(visit, resolve_mask(who, mask, params), params, *rest)


def path_string(path: tuple[Any, ...]) -> str:
    """A leaf's path as `"conv2/kernel"`, without the `.value` of NNX variables."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(
    who: str, path: Any, fn: Callable[..., Any], *args: Any, **options: Any
) -> Any:
    """Call `fn`; add `who` and the leaf's path to a `ValueError` or `TypeError`."""
    try:
        return fn(*args, **options)
    except (ValueError, TypeError) as error:
        # A subclass, such as JAX's tracer errors, may not take a plain message.
        if type(error) is not ValueError and type(error) is not TypeError:
            raise
        what, semicolon, fix = str(error).partition("; ")
        message = f"{who}: {what}{_at(path)}{semicolon}{fix}"
        raise type(error)(message) from error


def _check(
    kernel: Any, path: str, shapes: dict[str, tuple[int, ...] | None], *, centred: bool
) -> int:
    """Check that a leaf is a kernel; return the number of its leading stack axes."""
    out = "; leave it out with a mask" if path else ""
    try:
        check_kernel(kernel)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{error}{out}") from None
    shape = tuple(kernel.shape)
    layer_path, slash, name = path.rpartition("/")
    # `weight` is Equinox's name; its layers keep the output channel first.
    is_layer = name in ("kernel", "weight")
    bias = shapes.get(f"{layer_path}{slash}bias") if is_layer else None
    stack = stacked_axes(shape, bias)
    if stack is None:
        raise ValueError(
            f"expected a kernel [..., C_in, C_out] beside a bias [C_out], got shape "
            f"{shape} beside {bias}{out}"
        )
    if len(shape) > 2 and _is_projection(path, shapes):
        raise ValueError(
            f"expected a kernel [..., C_in, C_out], got shape {shape} at a path that "
            f"names an attention or einsum layer, whose axes have another order{out}"
        )
    if centred and kernel.shape[-2] < 2:
        raise ValueError(
            f"expected at least 2 input channels, got shape {shape}; mean-centring "
            "over 1 channel leaves only zeros: bound a depthwise kernel with clamp, "
            "and leave it out with a mask (keep_real = True on its layer leaves it out "
            "of inner_kernels)"
        )
    return stack


def stacked_axes(shape: tuple[int, ...], bias: tuple[int, ...] | None) -> int | None:
    """The number of leading stack axes of a kernel, according to the bias beside it.

    Args:
      shape: The kernel's shape.
      bias: The shape of its bias, or None.

    Returns:
      0 without a bias or with a bias `()` or `[C_out]`; `len(stack)` with a bias
      `[*stack, C_out]`; None with a bias that does not fit a kernel
      `[*stack, ..., C_in, C_out]`, or that also fits a kernel `[..., *outputs]`.
    """
    if not bias or prod(bias) == bias[-1] == shape[-1]:
        return 0
    stack = len(bias) - 1
    fits = stack <= len(shape) - 2 and bias == (*shape[:stack], shape[-1])
    # It may also be the bias of a dense layer with several output axes.
    ambiguous = bias == shape[-len(bias) :]
    return stack if fits and not ambiguous else None


def _is_projection(path: str, shapes: dict[str, Any]) -> bool:
    """Whether the path is Flax's name for a kernel with another order of axes."""
    layer_path = path.rpartition("/")[0]
    layer = layer_path.rpartition("/")[2]
    above = layer_path.removesuffix(layer)
    heads = "query", "key", "value", "out"
    found = sum(f"{above}{head}/kernel" in shapes for head in heads)
    named_by_linen = re.fullmatch(r"(DenseGeneral|Einsum)_\d+", layer) is not None
    return named_by_linen or (layer in heads and found > 1)


def _is_box(node: Any) -> bool:
    paths = jax.tree.leaves_with_path(node)
    return len(paths) == 1 and paths[0][0] == (jax.tree_util.GetAttrKey("value"),)


def _at(path: Any) -> str:
    return f" at {jax.tree_util.keystr(path)}" if path else ""


def _first_misfit(mask: Any, params: Any) -> str:
    known = [path for path, _ in jax.tree.leaves_with_path(params)]
    for path, _ in jax.tree.leaves_with_path(mask):
        if not any(leaf[: len(path)] == path for leaf in known):
            return f" (extra entry{_at(path)})"
    covered = [path for path, _ in jax.tree.leaves_with_path(mask)]
    for leaf in known:
        if not any(leaf[: len(path)] == path for path in covered):
            return f" (no entry for {jax.tree_util.keystr(leaf)})"
    return ""
