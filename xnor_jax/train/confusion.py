"""The confusion matrix of a network, as a table and as a figure."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from xnor_jax.data import ImageSet
from xnor_jax.packing.tables import make_table
from xnor_jax.train import figures

# A matrix of more classes is too wide for a terminal; its worst pairs are listed.
_WIDE = 12
_PAIRS = 20
_LONGEST = 24  # characters of a name in the figure


def matrix(logits: Callable[[np.ndarray], np.ndarray], dataset: ImageSet) -> np.ndarray:
    """Count test images by true and predicted class.

    Args:
      logits: Maps images, uint8 `[N, *image_shape]`, to logits `[N, classes]`.
      dataset: The data set with the test images.

    Returns:
      int `[classes, classes]`: rows are the true classes, columns the predicted ones.
    """
    classes = len(dataset.class_names)
    counts = np.zeros((classes, classes), int)
    for images, labels in dataset.test_splits():
        np.add.at(counts, (labels, logits(images).argmax(-1)), 1)
    return counts


def table(counts: np.ndarray, names: Sequence[str]) -> Table:
    """Tabulate the matrix, or, for many classes, the pairs most often confused.

    Args:
      counts: From `matrix`.
      names: The class names.
    """
    total = counts.sum(1)
    if len(names) <= _WIDE:
        room = max(4, 50 // len(names) - 1)  # of 80 columns
        heads = [name[:room] for name in names]
        if len(set(heads)) < len(heads):
            heads = [str(at) for at in range(1, len(names) + 1)]
            names = [f"{at} {name}" for at, name in zip(heads, names, strict=True)]
        titles = ("class", *heads, "right, %")
        result = make_table(titles, left=("class",), no_wrap=True)
        for at, name in enumerate(names):
            cells = [str(count) if count else "·" for count in counts[at]]
            share = f"{100 * counts[at, at] / total[at]:.1f}" if total[at] else ""
            result.add_row(name, *cells, share)
        return result
    names_first = ("class", "predicted as")
    result = make_table((*names_first, "images", "of its class, %"), left=names_first)
    wrong = counts - np.diag(np.diag(counts))
    for flat in np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]:
        row, column = divmod(int(flat), len(names))
        if not wrong[row, column]:
            break
        share = 100 * wrong[row, column] / total[row]
        result.add_row(
            names[row], names[column], f"{wrong[row, column]:,}", f"{share:.1f}"
        )
    return result


def picture(counts: np.ndarray, names: Sequence[str], title: str) -> Any:
    """Plot the matrix as a matplotlib figure, coloured by share of the true class."""
    side = max(4.5, min(14, 0.45 * len(names)))
    figure = figures.make_figure(side + 1.5, side)
    axis = figure.subplots()
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="of the true class, %")
    few = len(names) <= 30
    at = range(len(names)) if few else ()
    axis.set(
        title=figures.plain(title),
        xlabel="predicted",
        ylabel="true",
        xticks=at,
        yticks=at,
    )
    if few:
        labels = [figures.plain(name, _LONGEST) for name in names]
        axis.set_xticklabels(labels, rotation=90)
        axis.set_yticklabels(labels)
        for row, column in zip(*np.nonzero(counts), strict=True):
            axis.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                fontsize="small",
                color="white" if shares[row, column] > 55 else "black",
            )
    return figure
