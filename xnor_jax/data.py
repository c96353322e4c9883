"""Image sets: Hugging Face layouts, and scikit-learn's bundled digits.

A set is in memory, as arrays, or it stays on disk (`xnor_jax.streams`).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from xnor_jax.hub import Table
    from xnor_jax.streams import PictureSet


# The label of a row that only fills up a batch, and counts for nothing.
BLANK = -1


class DataError(Exception):
    """A data set that is missing, damaged or not what was asked for."""


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N], each in [0, classes)


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture of any size becomes one of the network's.

    Its shorter side becomes `resize` pixels long, then the middle `size × size` is cut.

    Raises:
      ValueError: If what is cut is larger than what is there.
    """

    size: int
    resize: int

    def __post_init__(self):
        if not 1 <= self.size <= self.resize:
            raise ValueError(
                f"Fit: expected 1 ≤ size ≤ resize, got {self.size} and {self.resize}"
            )


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a set comes from and how its pixels, in [0, 1], are normalised."""

    hub: str | None  # name on the Hugging Face hub, if it is there
    mean: tuple[float, ...]  # one per channel
    std: tuple[float, ...]
    streamed: bool = False  # pictures of any size, which stay on disk


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set in memory."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: Source

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return tuple(self.train.images.shape[1:])

    @property
    def train_images(self) -> int:
        """How many there are to train on."""
        return len(self.train.labels)

    @property
    def test_images(self) -> int:
        """How many there are to test on."""
        return len(self.test.labels)

    def test_splits(self) -> Iterator[Split]:
        """The test images, as parts that fit in memory: here as one."""
        yield self.test


SOURCES = {
    "digits": Source(None, (0.22,), (0.34,)),
    "mnist": Source("ylecun/mnist", (0.1307,), (0.3081,)),
    "fashion": Source("zalando-datasets/fashion_mnist", (0.2860,), (0.3530,)),
    "cifar10": Source(
        "uoft-cs/cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "imagenet": Source(
        "ILSVRC/imagenet-1k", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True
    ),
    # Pictures of nobody knows what.
    "folder": Source(None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), True),
}


def load(
    name: str, data_dir: str | Path | None = None, fit: Fit | None = None
) -> "Dataset | PictureSet":
    """Read a data set into memory, or open one that stays on disk.

    Args:
      name: One of `SOURCES`: `digits`, `mnist`, `fashion`, `cifar10` into memory;
        `imagenet` and `folder` stay on disk.
      data_dir: A folder in the layout of the Hugging Face hub, or, of a set that stays
        on disk, of class folders: `train/CLASS/*` and `validation/CLASS/*`. None for
        the hub itself. The digits are built in and take none.
      fit: The size of the images of a set that stays on disk; the others have theirs.

    Returns:
      The training and the test split.

    Raises:
      DataError: If the set is unknown, cannot be read, or its images or labels are not
        those of one set: the message says what would be right.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; expected one of {_names()}")
    source = SOURCES[name]
    if source.streamed:
        if fit is None:
            raise DataError(f"{name} has pictures of any size; expected an image size")
        if source.hub is None and data_dir is None:
            raise DataError("no folder of class folders; give one with --data-dir")
        from xnor_jax import streams

        return streams.open_set(source, data_dir, fit)
    if source.hub is None:
        if data_dir is not None:
            raise DataError(f"{name} is built in and takes no data folder: {data_dir}")
        return _digits(source)
    return _in_memory(source, data_dir)


def _digits(source: Source) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    # 8×8 in 0…16 becomes 28×28 in 0…255: each pixel 3×3, and a frame of 2.
    images = np.repeat(np.repeat(digits.images, 3, axis=1), 3, axis=2)
    images = np.pad(images * (255 / 16), ((0, 0), (2, 2), (2, 2))).round()
    parts: list[Any] = train_test_split(
        images.astype(np.uint8)[..., None],
        digits.target.astype(np.int32),
        test_size=0.2,
        random_state=0,
        stratify=digits.target,
    )
    train_images, test_images, train_labels, test_labels = parts
    return Dataset(
        Split(train_images, train_labels),
        Split(test_images, test_labels),
        tuple(str(name) for name in digits.target_names),
        source,
    )


def _in_memory(source: Source, data_dir: str | Path | None) -> Dataset:
    from xnor_jax import hub

    with hub.tables(source, data_dir, test=("test",)) as found:
        train, test = map(_arrays, (found.train, found.test))
    channels = len(source.mean)
    for split in (train, test):
        if split.images.shape[1:] != (*train.images.shape[1:3], channels):
            raise DataError(
                f"{found.where} has images of shape {split.images.shape[1:]}; expected "
                f"{channels} channels and one size in both splits"
            )
    return Dataset(train, test, found.class_names, source)


def _arrays(table: "Table") -> Split:
    images: np.ndarray | None = None
    for row, picture in enumerate(table.pictures):
        pixels = np.asarray(picture, np.uint8)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if images is None:
            images = np.empty((len(table.labels), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{table.name} has an image of shape {pixels.shape} in row {row}; "
                f"expected {images.shape[1:]} as in row 0"
            )
        images[row] = pixels
    assert images is not None
    return Split(images, table.labels)


def _names() -> str:
    return ", ".join(SOURCES)
