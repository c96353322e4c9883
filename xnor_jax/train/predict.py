"""Predictions of a packed network for images given as pixels."""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.data import SOURCES, DataError, Fit, ImageSet
from xnor_jax.packing.network import Info, PackedModel
from xnor_jax.train.step import Metrics

# Images per batch, which bounds the memory of the activations.
BATCH_SIZE = 500


class Prediction(NamedTuple):
    """A predicted class and its probability."""

    name: str
    probability: float


def logits(packed: PackedModel, pixels: np.ndarray) -> np.ndarray:
    """Compute the logits of images, in batches.

    Args:
      packed: A network with preprocessing in its `info`.
      pixels: uint8 `[N, *image_shape]`.

    Returns:
      float32 `[N, classes]`.

    Raises:
      DataError: If the network has no preprocessing, or takes images of another shape.
    """
    if packed.info.preprocessing is None:
        raise DataError("the network has no preprocessing; save it with preprocessing")
    if pixels.shape[1:] != packed.image_shape:
        raise DataError(
            f"expected images of shape {packed.image_shape}, got {pixels.shape[1:]}"
        )
    if not len(pixels):
        return np.empty((0, packed.classes or 0), np.float32)
    return in_batches(lambda batch: _logits(packed, batch), pixels)


def in_batches(
    function: Callable[[np.ndarray], jax.Array], pixels: np.ndarray
) -> np.ndarray:
    """Apply a function to at least one image, in batches of one size."""
    size = min(BATCH_SIZE, len(pixels))
    parts = []
    for first in range(0, len(pixels), size):
        # The last image pads the last batch, so that a single shape is compiled.
        index = np.minimum(np.arange(first, first + size), len(pixels) - 1)
        parts.append(np.asarray(function(pixels[index])))
    return np.concatenate(parts)[: len(pixels)]


def classify(
    packed: PackedModel, pixels: np.ndarray, *, top: int = 1
) -> list[list[Prediction]]:
    """Return the most probable classes of each image; numbers if they have no names.

    Args:
      packed: A network with preprocessing in its `info`.
      pixels: uint8 `[N, *image_shape]`.
      top: The number of classes per image; all if there are fewer.

    Returns:
      The predictions of each image, the most probable first.

    Raises:
      DataError: If the network has no preprocessing, or takes images of another shape.
    """
    probabilities = np.asarray(jax.nn.softmax(logits(packed, pixels)))
    names = packed.info.class_names
    # The first of equal ones, as in argmax.
    order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top]
    return [
        [Prediction(names[at] if names else str(at), float(row[at])) for at in best]
        for row, best in zip(probabilities, order, strict=True)
    ]


def evaluate(packed: PackedModel, dataset: ImageSet) -> Metrics:
    """Compute the loss and the accuracy on a data set's test split.

    Args:
      packed: A network with preprocessing in its `info`.
      dataset: The data set that it was trained on.

    Raises:
      DataError: If the network has no preprocessing, or other images or classes.
    """
    if packed.info.class_names:
        check_classes(packed.info.class_names, dataset)
    losses, right = [], []
    for images, labels in dataset.test_splits():
        found = logits(packed, images)
        if len(dataset.class_names) != found.shape[-1]:
            raise DataError(
                f"the network has {found.shape[-1]} classes, the data set has "
                f"{len(dataset.class_names)}; give the network's own with --data-dir"
            )
        scores = np.asarray(jax.nn.log_softmax(found))
        losses.append(-scores[np.arange(len(labels)), labels])
        right.append(found.argmax(-1) == labels)
    loss = np.concatenate(losses).mean(dtype=np.float64)
    return Metrics(float(loss), float(np.concatenate(right).mean()))


def check_classes(names: tuple[str, ...], dataset: ImageSet) -> None:
    """Check that a data set has the classes of a network.

    Raises:
      DataError: If it has others, or another order of them.
    """
    found = dataset.class_names
    if names != found:
        same = len(os.path.commonprefix([names, found]))
        raise DataError(
            f"the network has the classes {_some(names, same)}, the data set has "
            f"{_some(found, same)}; give the network's own with --data-dir"
        )


def dataset_name(info: Info) -> str:
    """Return the registered name of the data set that a network was trained on.

    Raises:
      DataError: If the network does not name its data set, or it is a custom one.
    """
    if info.dataset is None:
        raise DataError("the network does not name its data set; pack its run again")
    if info.dataset not in SOURCES:
        raise DataError(
            f"the network was trained on {info.dataset}, which is not one of the data "
            f"sets {', '.join(SOURCES)}; evaluate its run's folder"
        )
    return info.dataset


def fit(packed: PackedModel) -> Fit | None:
    """Return the fit of pictures of any size; None if the file does not define one."""
    pixels = packed.info.preprocessing
    if pixels is None or pixels.resize is None:
        return None
    return Fit(packed.image_shape[0], pixels.resize)


@jax.jit
def _logits(packed: PackedModel, pixels: jax.Array) -> jax.Array:
    assert packed.info.preprocessing is not None
    return packed(packed.info.preprocessing(jnp.asarray(pixels)))


def _some(names: tuple[str, ...], same: int) -> str:
    """Up to three of the names, with the first that differs from another list's."""
    first = max(0, same - 2)
    before, after = first > 0, len(names) > first + 3
    return ", ".join(["…"] * before + [*names[first : first + 3]] + ["…"] * after)
