"""The types of image data sets, and the error raised when one cannot be read."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

# The label of the rows that pad a batch; metrics ignore them.
BLANK = -1


class DataError(Exception):
    """A data set that is missing, damaged or not as requested."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set's origin, and the normalisation of its pixels in [0, 1]."""

    name: str
    mean: tuple[float, ...]  # one per channel
    std: tuple[float, ...]
    image_shape: tuple[int, int, int] | None  # None: pictures of any size, on disk
    hub: str | None = None  # name on the Hugging Face hub
    classes: int | None = None  # None: known from the data alone

    @property
    def streamed(self) -> bool:
        """Whether the set stays on disk."""
        return self.image_shape is None


@dataclasses.dataclass(frozen=True)
class Fit:
    """The resize and crop of a picture of any size to an image of `size × size`.

    The shorter side is resized to `resize` pixels, and the centre is cropped.

    Raises:
      ValueError: Unless 1 ≤ size ≤ resize.
    """

    size: int
    resize: int

    def __post_init__(self):
        if not 1 <= self.size <= self.resize:
            raise ValueError(
                f"Fit: expected 1 ≤ size ≤ resize, got {self.size} and {self.resize}"
            )


@dataclasses.dataclass(frozen=True)
class Holdout:
    """The test pictures to hold out of class folders without a split.

    Attributes:
      share: The share of each class to hold out, above 0 and below 1; at least one
        picture is held out, and at least one is not.
      seed: The seed of the random selection.

    Raises:
      ValueError: Unless 0 < share < 1.
    """

    share: float
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"Holdout: expected 0 < share < 1, got {self.share}")


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random augmentation of each training image.

    Attributes:
      resize_crop: Crop a random box of 8 to 100 % of the area, with an aspect ratio
        from 3/4 to 4/3, and resize it; only for pictures of any size.
      shift: Translate by up to this many pixels along each axis, filling with zeros.
      flip: Mirror each image left to right with probability 1/2.
    """

    resize_crop: bool = False
    shift: int = 0
    flip: bool = False


class Split(NamedTuple):
    """Images and their labels."""

    images: "np.ndarray"  # uint8 [N, H, W, C]
    labels: "np.ndarray"  # int32 [N], each in [0, classes)


class Row(NamedTuple):
    """A picture that is not decoded, and its class."""

    name: str  # for errors
    picture: str | bytes  # a path, or the file's content
    label: "np.int32"


class Rows(Protocol):
    """A split whose pictures are not decoded."""

    @property
    def labels(self) -> "np.ndarray":
        """The class of each row, int32 `[N]`."""
        ...

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __getitem__(self, index: int) -> Row:
        """The row at an index."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """All rows in order."""
        ...


class RowSet(NamedTuple):
    """The training and the test rows of a data set."""

    where: str  # for errors
    train: Rows
    test: Rows
    class_names: tuple[str, ...]


class ImageSet(Protocol):
    """A training and a test split, in memory or on disk."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        ...

    @property
    def source(self) -> Source:
        """The origin and the normalisation."""
        ...

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        ...

    @property
    def train_images(self) -> int:
        """The number of training images."""
        ...

    @property
    def test_images(self) -> int:
        """The number of test images."""
        ...

    def test_splits(self) -> Iterator[Split]:
        """The test images in order, in parts that fit in memory."""
        ...


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An image set in memory."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: Source

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return tuple(self.test.images.shape[1:])

    @property
    def train_images(self) -> int:
        """The number of training images."""
        return len(self.train.labels)

    @property
    def test_images(self) -> int:
        """The number of test images."""
        return len(self.test.labels)

    def test_splits(self) -> Iterator[Split]:
        """The test images, in one part."""
        yield self.test

    def without_train(self) -> "Dataset":
        """The set with an empty training split."""
        train = Split(self.train.images[:0], self.train.labels[:0])
        return dataclasses.replace(self, train=train)
