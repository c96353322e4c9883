"""Image sets as arrays: Hugging Face layouts, and scikit-learn's bundled digits."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class DataError(Exception):
    """A data set that is missing, damaged or not what was asked for."""


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # int32 [N], each in [0, classes)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a set comes from and how its pixels, in [0, 1], are normalised."""

    hub: str | None  # name on the Hugging Face hub; None for the bundled digits
    mean: tuple[float, ...]  # one per channel
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set in memory."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: Source


SOURCES = {
    "digits": Source(None, (0.22,), (0.34,)),
    "mnist": Source("ylecun/mnist", (0.1307,), (0.3081,)),
    "fashion": Source("zalando-datasets/fashion_mnist", (0.2860,), (0.3530,)),
    "cifar10": Source(
        "uoft-cs/cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
}


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Read a data set into memory.

    Args:
      name: `digits`, `mnist`, `fashion` or `cifar10`.
      data_dir: A folder in the layout of the Hugging Face hub; None for the hub itself.
        The digits are built in and take none.

    Returns:
      The training and the test split.

    Raises:
      DataError: If the set is unknown, cannot be read, or its images or labels are not
        those of one set: the message says what would be right.
    """
    if name not in SOURCES:
        raise DataError(f"unknown data set {name!r}; expected one of {_names()}")
    source = SOURCES[name]
    if source.hub is None:
        if data_dir is not None:
            raise DataError(f"{name} is built in and takes no data folder: {data_dir}")
        return _digits(source)
    return _hugging_face(source, data_dir)


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


def _hugging_face(source: Source, data_dir: str | Path | None) -> Dataset:
    import datasets

    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(
            f"no folder {data_dir}; expected one in the layout of the hub's "
            f"{source.hub}"
        )
    where = str(data_dir) if data_dir is not None else str(source.hub)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        table = datasets.load_dataset(where)
        missing = {"train", "test"} - set(table)
        if missing:
            raise DataError(
                f"{where} has no split {' and no split '.join(sorted(missing))}; "
                f"expected train and test, found {', '.join(map(str, table))}"
            )
        image, label = _columns(where, table["train"].features)
        names = tuple(table["train"].features[label].names)
        train, test = (
            _arrays(f"{where}, {split}", table[split], image, label, len(names))
            for split in ("train", "test")
        )
    except DataError:
        raise
    except Exception as error:  # datasets raises its readers' own, of any kind
        mend = (
            "check the files"
            if data_dir is not None
            else "the hub may be out of reach: give a folder with --data-dir"
        )
        cause = error.__cause__ or error  # what the reader itself ran into
        reason = str(cause).strip().splitlines() or [""]
        raise DataError(
            f"cannot read {where} ({type(cause).__name__}: {reason[0]}); {mend}"
        ) from error
    channels = len(source.mean)
    for split in (train, test):
        if split.images.shape[1:] != (*train.images.shape[1:3], channels):
            raise DataError(
                f"{where} has images of shape {split.images.shape[1:]}; expected "
                f"{channels} channels and one size in both splits"
            )
    return Dataset(train, test, names, source)


def _columns(where: str, features: Any) -> tuple[str, str]:
    import datasets

    def only(kind: type, what: str) -> str:
        found = [name for name, value in features.items() if isinstance(value, kind)]
        if len(found) != 1:
            raise DataError(
                f"{where} has {len(found)} {what} columns; expected one, found columns "
                f"{', '.join(features)}"
            )
        return found[0]

    return only(datasets.Image, "image"), only(datasets.ClassLabel, "class label")


def _arrays(where: str, table: Any, image: str, label: str, classes: int) -> Split:
    labels = np.asarray(table[label][:], np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{where} has label {labels[wrong[0]]} in row {wrong[0]}; expected 0 to "
            f"{classes - 1}"
        )
    images: np.ndarray | None = None
    for row, picture in enumerate(table[image]):
        pixels = np.asarray(picture, np.uint8)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if images is None:
            images = np.empty((len(labels), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{where} has an image of shape {pixels.shape} in row {row}; expected "
                f"{images.shape[1:]} as in row 0"
            )
        images[row] = pixels
    if images is None:
        raise DataError(f"{where} has no rows; expected at least one")
    return Split(images, labels.astype(np.int32))


def _names() -> str:
    return ", ".join(SOURCES)
