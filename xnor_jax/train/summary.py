"""A recipe's network as a table: which kernels are binary, and what they cost."""

import math
from typing import Any

import jax
from flax import nnx
from rich.table import Table

from xnor_jax import data, masks
from xnor_jax.train import network
from xnor_jax.train.recipe import Recipe, to_json


def table(name: str, recipe: Recipe) -> Table:
    """The parameters in the order of definition, each with its bits.

    Args:
      name: The recipe's name, for the title.
      recipe: What to summarize.

    Returns:
      A table to print: kernel, shape, weights, filter size n, bits a weight.

    Raises:
      RecipeError: If the network cannot be built for the data set's images.
      DataError: If a data set of one's own fails.
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
        if on and recipe.binary
    }
    kernels = ["/".join(map(str, paths[0])) for paths in masks.definition_order(model)]
    fields = to_json(recipe)
    result = Table(
        title=f"{name}: {fields['model']}, {fields['dataset']}", title_style="bold"
    )
    for column in ("kernel", "shape", "weights", "n", "bits"):
        justify = "left" if column in ("kernel", "shape") else "right"
        result.add_column(column, justify=justify, no_wrap=True)
    one_bit = 0
    for path in kernels:
        shape = leaves[path].shape
        size, binary = math.prod(shape), path in inner
        one_bit += size * binary
        result.add_row(
            path,
            "×".join(map(str, shape)),
            f"{size:,}",
            f"{size // shape[-1]:,}",
            "1" if binary else "32",
            style="bold" if binary else None,
        )
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    listed = sum(math.prod(leaves[path].shape) for path in kernels)
    result.add_row("biases, BatchNorm", "", f"{total - listed:,}", "", "32")
    result.add_section()
    result.add_row(
        f"{len(inner)} of {len(kernels)} kernels binary",
        "",
        f"{total:,}",
        "",
        f"{(one_bit + 32 * (total - one_bit)) / total:.2f}",
    )
    return result


def _images(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    """The shape of the images, and how many classes; of sets with files a guess."""
    if callable(recipe.dataset):
        dataset = data.load(recipe.dataset)
        return dataset.image_shape, len(dataset.class_names)
    source = data.SOURCES[recipe.dataset]
    size = recipe.image_size or 0  # which a set of pictures of any size needs
    return source.image_shape or (size, size, len(source.mean)), 10
