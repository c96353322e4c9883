"""Data sets in memory, from pictures or from a function that returns arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xnor_jax._words import counted, described
from xnor_jax.data import pictures
from xnor_jax.data.layouts import open_rows
from xnor_jax.data.sets import DataError, Dataset, Rows, Source, Split
from xnor_jax.registry import describe


def from_pictures(
    source: Source, data_dir: str | Path | None, *, train: bool = True
) -> Dataset:
    """Decode the pictures of a data set into memory.

    Args:
      source: The data set.
      data_dir: A folder in the hub's layout or of class folders; None loads the set
        from the hub.
      train: Whether to read the training split; without it, that split is empty.

    Raises:
      DataError: If the set cannot be read, its images differ in shape, or their number
        of channels is not that of `source`.
    """
    found = open_rows(source, data_dir, test=("test",), train=train)
    splits = [_decode(rows) for rows in (found.train, found.test) if len(rows)]
    channels = len(source.mean)
    for split in splits:
        if split.images.shape[1:] != (*splits[0].images.shape[1:3], channels):
            raise DataError(
                f"{found.where} has images of shape {split.images.shape[1:]}; expected "
                f"{counted(channels, 'channel')} and one size in both splits"
            )
    every = Dataset(splits[0], splits[-1], found.class_names, source)
    return every if train else every.without_train()


def from_function(function: Callable[[], Any]) -> Dataset:
    """Build a data set from the arrays that a function returns.

    Args:
      function: Returns `(train_images, train_labels, test_images, test_labels)`: uint8
        `[N, H, W, C]` and integers `[N]` from 0 to the largest training label.

    Returns:
      The data set. Its source has the mean and standard deviation of each channel of
      the training images (1 for a constant channel); its class names are the labels.

    Raises:
      DataError: If the function fails or returns anything else; the message names the
        array.
    """
    name = describe(function)
    try:
        found = function()
    except (Exception, SystemExit) as error:
        raise DataError(f"{name} failed: {described(error)}") from error
    names = ("train_images", "train_labels", "test_images", "test_labels")
    if not isinstance(found, tuple | list) or len(found) != 4:
        got = type(found).__name__
        if isinstance(found, tuple | list):
            got = f"{len(found)} values"
        raise DataError(f"{name}: expected ({', '.join(names)}), got {got}")
    train_images, train_labels, test_images, test_labels = (
        _array(f"{name}: {what}", value)
        for what, value in zip(names, found, strict=True)
    )
    _check_split(name, "train", train_images, train_labels)
    _check_split(name, "test", test_images, test_labels)
    if test_images.shape[1:] != train_images.shape[1:]:
        raise DataError(
            f"{name}: test_images: expected images of shape {train_images.shape[1:]} "
            f"as in train_images, got {test_images.shape[1:]}"
        )
    classes = int(train_labels.max()) + 1
    if classes == 1:
        raise DataError(f"{name}: train_labels: expected at least two classes, got one")
    if test_labels.max() >= classes:
        raise DataError(
            f"{name}: test_labels: expected 0 to {classes - 1} as in train_labels, "
            f"got {test_labels.max()}"
        )
    mean, std = _moments(train_images)
    return Dataset(
        Split(train_images, train_labels.astype(np.int32)),
        Split(test_images, test_labels.astype(np.int32)),
        tuple(map(str, range(classes))),
        Source(name, mean, std, train_images.shape[1:]),
    )


def _decode(rows: Rows) -> Split:
    images: np.ndarray | None = None
    broken: list[DataError] = []
    for at, row in enumerate(rows):
        try:
            picture = pictures.read_as_stored(row.picture, name=row.name)
        except DataError as error:
            broken.append(error)
            continue
        pixels = pictures.to_array(picture)
        if images is None:
            images = np.empty((len(rows), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{row.name} has shape {pixels.shape}; expected {images.shape[1:]}, as "
                "of the first image"
            )
        images[at] = pixels
    pictures.refuse(broken)
    assert images is not None
    return Split(images, rows.labels)


def _array(what: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:
        raise DataError(f"{what}: expected an array, got {type(value)}") from error


def _check_split(name: str, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    def expect(holds: bool, what: str, expected: str, got: object) -> None:
        if not holds:
            raise DataError(f"{name}: {split}_{what}: expected {expected}, got {got}")

    expect(images.dtype == np.uint8, "images", "uint8", images.dtype)
    expect(images.ndim == 4, "images", "shape [N, H, W, C]", images.shape)
    expect(images.size > 0, "images", "at least one pixel", images.shape)
    whole = np.issubdtype(labels.dtype, np.integer)
    expect(whole, "labels", "integers", labels.dtype)
    expect(
        labels.shape == images.shape[:1],
        "labels",
        f"shape ({len(images)},)",
        labels.shape,
    )
    expect(labels.min() >= 0, "labels", "numbers of at least 0", labels.min())
    expect(labels.max() < 2**20, "labels", "class numbers below 2²⁰", labels.max())


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, of pixels in [0, 1], from exact sums."""
    count = images[..., 0].size
    sums = images.sum((0, 1, 2), dtype=np.int64)
    squares = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64)
    mean, std = [], []
    for total, square in zip(map(int, sums), map(int, squares), strict=True):
        variance = count * square - total * total  # in integers, so exact
        mean.append(total / count / 255)
        std.append(variance**0.5 / count / 255 if variance else 1.0)
    return tuple(mean), tuple(std)
