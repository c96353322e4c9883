"""Feature maps of a packed network: the signs into its first binary convolutions."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from xnor_jax import ops
from xnor_jax.packing import PackedModel
from xnor_jax.packing.graph import BinaryConv, as_floats
from xnor_jax.train import figures

_CHANNELS = 32  # of a layer's input that are drawn


class Layer(NamedTuple):
    """A binary convolution and its input."""

    name: str
    kernel: np.ndarray  # signs [*window, C_in / groups, C_out]
    features: np.ndarray  # signs [H, W, C_in] of one image


def layers(packed: PackedModel, pixels: np.ndarray, most: int = 2) -> list[Layer]:
    """Find the first binary convolutions of a network, and their inputs for an image.

    Args:
      packed: A network with preprocessing in its `info`.
      pixels: An image, uint8 `[H, W, C]`.
      most: The maximum number of layers.
    """
    assert packed.info.preprocessing is not None
    values: list[Any] = [packed.info.preprocessing(jnp.asarray(pixels)[None])]
    found: list[Layer] = []
    for node in packed.nodes:
        args = [values[i] for i in node.inputs]
        values.append(node(args, packed.backend))
        if isinstance(node, BinaryConv):
            features = np.asarray(as_floats(args[0]))[0]
            kernel = np.asarray(ops.unpack_kernel(node.arrays["kernel"]))
            if features.ndim == 3 and kernel.ndim == 4:
                found.append(Layer(node.name, kernel, features))
            if len(found) == most:
                break
    return found


def picture(packed: PackedModel, pixels: np.ndarray, title: str) -> Any:
    """Plot an image, the inputs of the first binary convolutions, and their kernels.

    Args:
      packed: A network with preprocessing in its `info`.
      pixels: An image, uint8 `[H, W, C]`.
      title: The title of the figure.

    Returns:
      A matplotlib figure; None if the network has no such layer.
    """
    rows = layers(packed, pixels)
    if not rows:
        return None
    figure = figures.make_figure(13, 4.4 * len(rows))
    figure.suptitle(figures.plain(title))
    axes = figure.subplots(len(rows), 3, width_ratios=(1, 2, 1.3), squeeze=False)
    for axis in axes[:, 0]:
        axis.set_axis_off()
    axes[0, 0].imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes[0, 0].set(title="a test image")
    for row, (_, signs, kernel) in zip(rows, axes, strict=True):
        features = row.features[..., :_CHANNELS]
        count = features.shape[-1]
        tiles = np.pad(features, ((0, 1), (0, 1), (0, -count % 8)))
        height, width, total = tiles.shape
        grid = tiles.transpose(2, 0, 1).reshape(total // 8, 8, height, width)
        grid = grid.transpose(0, 2, 1, 3).reshape(total // 8 * height, 8 * width)
        signs.imshow(grid, cmap="RdBu", vmin=-1.5, vmax=1.5, interpolation="nearest")
        signs.set(
            title=f"its signs into {row.name}",
            xlabel=f"{count} of {row.features.shape[-1]} channels; blue +1, red −1",
            xticks=[],
            yticks=[],
        )
        figures.draw_signs(kernel, row.name, row.kernel)
    return figure
