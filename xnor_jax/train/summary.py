"""A table of a recipe's network: which layers are binary, and their costs."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from xnor_jax import data, masks
from xnor_jax.packing import PackedModel
from xnor_jax.packing.compiler import pack_unchecked
from xnor_jax.packing.graph import specs_of
from xnor_jax.packing.tables import make_table
from xnor_jax.train import network, ship
from xnor_jax.train.folder import RunWarning
from xnor_jax.train.recipe import Recipe, to_json


def table(name: str, recipe: Recipe) -> Table:
    """Tabulate the layers in order of definition, with their bits and costs.

    The costs come from packing the network with arbitrary weights.

    Args:
      name: The recipe's name, for the title.
      recipe: The recipe to summarize.

    Returns:
      A table to print: layer, kernel, weights, bits per weight, output, MACs per image
      and bytes in a packed file.

    Raises:
      RecipeError: If the network cannot be built for the data set's images.
      DataError: If a custom data set fails.
    """
    image_shape, classes = _images(recipe)
    build = network.builder(recipe, image_shape=image_shape, classes=classes)
    model = network.abstract(recipe, build, image_shape, classes)
    leaves: dict[str, Any] = {
        masks.path_string(path): leaf
        for path, leaf in jax.tree.leaves_with_path(nnx.state(model, nnx.Param))
    }
    inner = {
        masks.path_string(path)
        for path, on in jax.tree.leaves_with_path(network.binary_kernels(model))
        if on and recipe.binary_weights
    }
    kernels = ["/".join(map(str, paths[0])) for paths in masks.definition_order(model)]
    filled = build() if callable(recipe.model) else _fill_randomly(model)
    packed = _packed(name, filled, image_shape)
    costs = {} if packed is None else _costs(packed)
    fields = to_json(recipe)
    shape = "×".join(map(str, image_shape))
    result = make_table(
        ("layer", "kernel", "weights", "bits", "output", "MACs", "bytes"),
        left=("layer", "kernel"),
        title=f"{name}: {fields['model']}, {fields['dataset']}, {classes} classes, "
        f"images {shape};\n{len(inner)} of {len(kernels)} kernels binary",
        no_wrap=True,
    )
    one_bit = 0
    for path in kernels:
        size, binary = math.prod(leaves[path].shape), path in inner
        one_bit += size * binary
        layer = path.removesuffix("/kernel")
        result.add_row(
            layer.removesuffix("/layer"),
            "×".join(map(str, leaves[path].shape)),
            f"{size:,}",
            "1" if binary else "32",
            *costs.get(layer, ("", "", "")),
            style="bold" if binary else None,
        )
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    listed = sum(math.prod(leaves[path].shape) for path in kernels)
    others = ("biases, norms", "", f"{total - listed:,}", "32", "", "", "")
    result.add_row(*others)
    result.add_section()
    bits = (one_bit + 32 * (total - one_bit)) / total
    sums = ("", "", "")
    if packed is not None:
        rows = packed.report.rows
        macs = sum(row.binary_macs + row.real_macs for row in rows)
        sums = ("", _short(macs), f"{packed.report.bytes_after:,}")
    result.add_row("all", "", f"{total:,}", f"{bits:.2f}", *sums)
    if packed is not None:
        for kind in ("binary", "real"):
            macs = sum(getattr(row, f"{kind}_macs") for row in packed.report.rows)
            result.add_row(f"  {kind} MACs", "", "", "", "", _short(macs), "")
        before = 4 * total
        result.add_row("  in float32", "", "", "", "", "", f"{before:,}")
    return result


def _fill_randomly(model: nnx.Module) -> nnx.Module:
    """Fill an abstract model with random values, much faster than the initializers."""
    rng = np.random.default_rng(0)

    def number(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # Scales and variances have one axis or none, and are above 0.
        drawn = rng.random(leaf.shape, np.float32) + (0.5 if leaf.ndim < 2 else -0.5)
        return drawn.astype(leaf.dtype)

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(number, state))


def _packed(
    name: str, model: nnx.Module, image_shape: tuple[int, ...]
) -> PackedModel | None:
    model.eval()
    try:
        return ship.pack_model(model, image_shape, pack_unchecked)
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix("pack: ")
        warnings.warn(f"{name} cannot be packed: {reason}", RunWarning, stacklevel=2)
        return None


def _costs(packed: PackedModel) -> dict[str, tuple[str, str, str]]:
    """Output shape, MACs and bytes by layer name."""
    specs = specs_of(packed.nodes, packed.image_shape)
    outputs = {
        node.name: "×".join(map(str, spec.shape))
        for node, spec in zip(packed.nodes, specs[1:], strict=True)
        if node.weights
    }
    return {
        row.name: (
            outputs[row.name],
            _short(row.binary_macs + row.real_macs),
            f"{row.bytes_after:,}",
        )
        for row in packed.report.rows
    }


def _short(number: int) -> str:
    """Format a number, a large one with three digits.

    >>> _short(9999), _short(999_999), _short(117_964_800), _short(1_814_073_344)
    ('9,999', '1.00M', '118M', '1.81G')
    """
    if number < 10_000:
        return f"{number:,}"
    unit = min((len(str(round(number, 3 - len(str(number))))) - 1) // 3, 3)
    return f"{number / 1000**unit:#.3g}".rstrip(".") + " kMG"[unit]


def _images(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """The image shape and the number of classes; 10 for folders, which have any."""
    if callable(recipe.dataset):
        dataset = data.load(recipe.dataset)
        return dataset.image_shape, len(dataset.class_names)
    source = data.SOURCES[recipe.dataset]
    size = recipe.image_size or 0  # required for pictures of any size
    shape = source.image_shape or (size, size, len(source.mean))
    return shape, source.classes or 10
