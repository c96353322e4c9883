"""Which leaves are binary: bool trees of the parameters' structure."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx


def inner_kernels(model: nnx.Module) -> Any:
    """Every convolution and dense kernel but the first and the last.

    The order is the order of definition: the order in which the module's constructor
    assigned its attributes, a list's items in theirs. (A pytree's own order is
    alphabetical: `conv10` before `conv2`.) A kernel is an `nnx.Param` of rank 2 or more
    that a module holds as its attribute `kernel`; a module that is reached twice counts
    where it is reached first. Kernels in a module whose attribute `keep_real` is True,
    such as a residual network's shortcuts, stay real as well.

    Args:
      model: An NNX module.

    Returns:
      A bool tree of the structure of `nnx.state(model, nnx.Param)`.

    Raises:
      ValueError: If the model has fewer than three kernels, so that none is inner.

    References:
      Rastegari et al., XNOR-Net, 2016, §4: the first and last layer stay real.
    """
    kernels = definition_order(model)
    if len(kernels) < 3:
        raise ValueError(
            "inner_kernels: expected a model with at least 3 convolution or dense "
            f"kernels, got {len(kernels)}; the first and the last stay real"
        )
    real = [
        path
        for path, module in nnx.iter_modules(model)
        if getattr(module, "keep_real", False)
    ]
    inner = {
        path
        for paths in kernels[1:-1]
        for path in paths
        if not any(path[: len(start)] == start for start in real)
    }
    return _paths_to_mask(model, inner)


def norm_scales(model: nnx.Module) -> Any:
    """The affine scales of BatchNorm, for `optim.project(scale_mask=…)`.

    Args:
      model: An NNX module.

    Returns:
      A bool tree of the structure of `nnx.state(model, nnx.Param)`.
    """
    scales = {
        (*path, "scale")
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    return _paths_to_mask(model, scales)


def mask_by_path(params: Any, predicate: Callable[[str, Any], bool]) -> Any:
    """A mask from each leaf's path and value.

    Args:
      params: Any pytree.
      predicate: Called with the path, such as `"conv2/kernel"`, and the leaf; returns
        whether the leaf is binary.

    Returns:
      A bool tree of the structure of `params`.

    Raises:
      ValueError: If the predicate selects no leaf at all; the message lists the paths.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}
      >>> xnor.mask_by_path(params, lambda path, leaf: path.endswith("kernel"))
      {'conv': {'bias': False, 'kernel': True}}
    """
    mask = jax.tree.map_with_path(
        lambda path, leaf: bool(predicate(path_string(path), leaf)), params
    )
    if not any(jax.tree.leaves(mask)):
        paths = [path_string(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(
            f"mask_by_path: the predicate selects no leaf of {', '.join(paths) or '{}'}"
        )
    return mask


def path_string(path: tuple[Any, ...]) -> str:
    """A leaf's path as `"conv2/kernel"`; without the `.value` of NNX variables."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def definition_order(model: nnx.Module) -> list[list[tuple[Any, ...]]]:
    """The kernels of a module in the order of definition.

    Args:
      model: An NNX module.

    Returns:
      For each kernel, every path that leads to it: more than one where it is shared.
    """
    found: dict[int, list[tuple[Any, ...]]] = {}
    _collect_kernels(model, (), found, on_path=set())
    return list(found.values())


def _collect_kernels(node: Any, path: tuple[Any, ...], found, on_path: set[int]):
    if id(node) in on_path:
        return
    if isinstance(node, nnx.Param):
        if path[-1] == "kernel" and node.ndim >= 2:
            found.setdefault(id(node), []).append(path)
        return
    for name, child in _children(node):
        _collect_kernels(child, (*path, name), found, on_path | {id(node)})


def _children(node: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(node, nnx.List | list | tuple):
        return enumerate(node)
    if isinstance(node, dict):
        if sum(isinstance(child, nnx.Module) for child in node.values()) > 1:
            raise ValueError(
                f"inner_kernels: a plain dict of modules ({', '.join(map(str, node))}) "
                "keeps no order of definition; use nnx.Dict or nnx.List"
            )
        return node.items()
    if isinstance(node, nnx.Module):
        attributes = vars(node)
        # `nnx.merge`, `clone` and `eval_shape` rebuild a module with its attributes
        # sorted; only this register of Flax's still has them as they were assigned.
        order = attributes.get("_pytree__nodes", attributes)
        return [(name, attributes[name]) for name in order if name in attributes]
    return ()


def _paths_to_mask(model: nnx.Module, paths: set[tuple[Any, ...]]) -> Any:
    params = nnx.state(model, nnx.Param)
    chosen = {"/".join(map(str, path)) for path in paths}
    return jax.tree.map_with_path(lambda path, _: path_string(path) in chosen, params)
