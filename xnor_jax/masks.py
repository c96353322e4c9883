"""Masks of the binary leaves: bool trees with the structure of the parameters."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from flax import nnx

from xnor_jax._tree import path_string, stacked_axes


def inner_kernels(model: nnx.Module) -> Any:
    """Select every convolution and dense kernel except the first and the last.

    Kernels are ordered by definition: the order in which the module's constructor
    assigned its attributes, and the order of a list's items. (A pytree is ordered
    alphabetically: `conv10` before `conv2`.) A kernel is an `nnx.Param` of rank 2 or
    more in a module's attribute `kernel`; a shared kernel counts once, at its first
    place. Kernels in a module whose attribute `keep_real` is True, such as a residual
    network's shortcuts, stay real as well.

    The kernel layout `[..., C_in, C_out]` is known for `BinaryConv`, `BinaryLinear`,
    `nnx.Conv`, `nnx.Linear`, `nnx.ConvTranspose` without `transpose_kernel`,
    `nnx.LinearGeneral` with one input and one output axis, and their subclasses. A
    custom layer declares this layout with an attribute `kernel_rank`, the rank of its
    kernel. Any other layer with an inner kernel is rejected.

    Args:
      model: An NNX module.

    Returns:
      A bool tree with the structure of `nnx.state(model, nnx.Param)`.

    Raises:
      ValueError: If the model has fewer than three kernels, so that none is inner; if
        the layout of an inner kernel is unknown, such as that of the projections of
        `nnx.MultiHeadAttention`; or if an inner kernel is a stack, as `nnx.vmap`
        creates it, without a bias that shows this.
      TypeError: If the model is not an NNX module.

    References:
      Rastegari et al., XNOR-Net, 2016, §4: the first and last layer stay real.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"inner_kernels: expected an nnx.Module, got {type(model).__name__}; for "
            "Linen, Equinox or bare trees use mask_by_path(params, predicate)"
        )
    kernels = _kernels(model)
    if len(kernels) < 3:
        raise ValueError(
            "inner_kernels: expected a model with at least 3 convolution or dense "
            f"kernels, got {len(kernels)}, of which the first and the last stay real; "
            "use mask_by_path(model, predicate)"
        )
    real = [
        path
        for path, module in nnx.iter_modules(model)
        if getattr(module, "keep_real", False)
    ]
    inner = set()
    for kernel in kernels[1:-1]:
        binary = {
            path
            for path in kernel.paths
            if not any(path[: len(start)] == start for start in real)
        }
        if binary:
            _check_layout(kernel, "inner_kernels", "set keep_real = True on the layer")
        inner |= binary
    return _paths_to_mask(model, inner)


def norm_scales(model: nnx.Module) -> Any:
    """Select the scales of BatchNorm, for `optim.project(scale_mask=…)`.

    Args:
      model: An NNX module.

    Returns:
      A bool tree with the structure of `nnx.state(model, nnx.Param)`.
    """
    scales = {
        (*path, "scale")
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    return _paths_to_mask(model, scales)


def mask_by_path(params: Any, predicate: Callable[[str, Any], bool]) -> Any:
    """Create a mask from each leaf's path and value.

    Args:
      params: Any pytree, or an NNX module, whose layers show the layout of their
        kernels. In another tree, a kernel without a bias is taken to have the layout
        `[..., C_in, C_out]`, if its path is not Flax's name for another one.
      predicate: Called with the path, such as `"conv2/kernel"`, and the leaf; returns
        whether the leaf is binary.

    Returns:
      A bool tree with the structure of `params`, or of `nnx.state(model, nnx.Param)`
      for a module.

    Raises:
      ValueError: If the predicate selects no leaf; the message lists the paths. If it
        selects a kernel of a module that `inner_kernels` rejects.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}
      >>> xnor.mask_by_path(params, lambda path, leaf: path.endswith("kernel"))
      {'conv': {'bias': False, 'kernel': True}}
    """
    model = params if isinstance(params, nnx.Module) else None
    if model is not None:
        params = nnx.state(model, nnx.Param)
    mask = jax.tree.map_with_path(
        lambda path, leaf: bool(predicate(path_string(path), leaf)), params
    )
    if not any(jax.tree.leaves(mask)):
        paths = [path_string(path) for path, _ in jax.tree.leaves_with_path(params)]
        raise ValueError(
            f"mask_by_path: the predicate selects no leaf of {', '.join(paths) or '{}'}"
        )
    if model is not None:
        leaves = zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(mask), strict=True
        )
        shapes = {path_string(path): leaf.shape for (path, leaf), one in leaves if one}
        for above, layer in nnx.iter_modules(model):
            path = (*above, "kernel")
            if (shape := shapes.get("/".join(map(str, path)))) is not None:
                kernel = _Kernel([path], layer, shape)
                _check_layout(kernel, "mask_by_path", "change the predicate")
    return mask


def definition_order(model: nnx.Module) -> list[list[tuple[Any, ...]]]:
    """List the kernels of a module in the order of definition.

    Args:
      model: An NNX module.

    Returns:
      For each kernel, all paths to it: more than one if it is shared.
    """
    return [kernel.paths for kernel in _kernels(model)]


class _Kernel(NamedTuple):
    """A kernel of a module: all paths to it, the layer at the first, its shape."""

    paths: list[tuple[Any, ...]]
    layer: Any
    shape: tuple[int, ...]


def _kernels(model: nnx.Module) -> list[_Kernel]:
    found: dict[int, _Kernel] = {}

    def collect(node: Any, path: tuple[Any, ...], above: tuple[Any, ...]) -> None:
        if isinstance(node, nnx.Param):
            if path[-1] == "kernel" and node.ndim >= 2:
                kernel = _Kernel([], above[-1], tuple(node.shape))
                found.setdefault(id(node), kernel).paths.append(path)
        elif not any(node is other for other in above):
            for name, child in _children(node):
                collect(child, (*path, name), (*above, node))

    collect(model, (), ())
    return list(found.values())


def _check_layout(kernel: _Kernel, caller: str, remedy: str) -> None:
    """Reject a kernel of unknown layout, or a stack of kernels without a bias.

    The tree functions recognize a stack by the bias beside it.

    Args:
      kernel: The kernel.
      caller: The function that the error names.
      remedy: What leaves the kernel out.
    """
    path, layer = "/".join(map(str, kernel.paths[0])), kernel.layer
    kind, rank = type(layer).__name__, kernel_rank(layer)
    if rank is None:
        raise ValueError(
            f"{caller}: expected kernels [..., C_in, C_out], got {path} of shape "
            f"{kernel.shape} in {kind}, a layer of unknown axis order; {remedy} to "
            "leave it out, or set kernel_rank on a custom layer"
        )
    bias = getattr(layer, "bias", None)
    stack = len(kernel.shape) - rank
    if stack != stacked_axes(kernel.shape, None if bias is None else bias.shape):
        raise ValueError(
            f"{caller}: expected a kernel of rank {rank} in {kind}, got {path} of "
            f"shape {kernel.shape}; stack layers along their leading axes and with a "
            f"bias, or {remedy} to leave it out"
        )


def kernel_rank(layer: Any) -> int | None:
    """The rank of a layer's kernel `[..., C_in, C_out]`; None for an unknown layout."""
    if isinstance(layer, nnx.Conv | nnx.ConvTranspose):
        transposed = getattr(layer, "transpose_kernel", False)
        return None if transposed else len(layer.kernel_size) + 2
    if isinstance(layer, nnx.LinearGeneral):
        axes = *layer.batch_axis, *layer.in_features, *layer.out_features
        return 2 if len(axes) == 2 else None
    return 2 if isinstance(layer, nnx.Linear) else getattr(layer, "kernel_rank", None)


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
        # Flax has no public API for the order of definition: `nnx.merge`, `clone` and
        # `eval_shape` rebuild a module with its attributes sorted.
        order = attributes.get("_pytree__nodes", attributes)
        return [(name, attributes[name]) for name in order if name in attributes]
    return ()


def _paths_to_mask(model: nnx.Module, paths: set[tuple[Any, ...]]) -> Any:
    params = nnx.state(model, nnx.Param)
    chosen = {"/".join(map(str, path)) for path in paths}
    return jax.tree.map_with_path(lambda path, _: path_string(path) in chosen, params)
