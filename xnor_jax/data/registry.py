"""The image data sets by name, and `load`, which opens one."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xnor_jax.data.sets import DataError, Dataset, Fit, Holdout, Source

if TYPE_CHECKING:
    from xnor_jax.data.streams import PictureSet

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

SOURCES = {
    source.name: source
    for source in (
        Source("digits", (0.22,), (0.34,), (28, 28, 1), classes=10),
        Source("mnist", (0.1307,), (0.3081,), (28, 28, 1), "ylecun/mnist", 10),
        Source(
            "fashion",
            (0.2860,),
            (0.3530,),
            (28, 28, 1),
            "zalando-datasets/fashion_mnist",
            10,
        ),
        Source(
            "cifar10",
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            (32, 32, 3),
            "uoft-cs/cifar10",
            10,
        ),
        Source("imagenet", *_IMAGENET, None, "ILSVRC/imagenet-1k", 1000),
        Source("folder", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), None),
    )
}

Arrays = tuple[Any, Any, Any, Any]


def load(
    dataset: str | Callable[[], Arrays],
    data_dir: str | Path | None = None,
    fit: Fit | None = None,
    holdout: Holdout | None = None,
    *,
    train: bool = True,
) -> "Dataset | PictureSet":
    """Load an image data set into memory, or open one that stays on disk.

    Args:
      dataset: A name in `SOURCES`: `digits`, `mnist`, `fashion` and `cifar10` are read
        into memory, `imagenet` and `folder` stay on disk. Or a function without
        arguments that returns `(train_images, train_labels, test_images, test_labels)`:
        uint8 `[N, H, W, C]` and integers `[N]` from 0. Its pixels are normalised by the
        mean and standard deviation of each channel of the training images.
      data_dir: A folder in the layout of the Hugging Face hub, or of class folders:
        `train/CLASS/*` and `validation/CLASS/*`, or `test/CLASS/*` for a set in memory.
        None loads the set from the hub; `digits` and functions require None.
      fit: The image size of a set that stays on disk; ignored for the others.
      holdout: The part to hold out of class folders without a split, `CLASS/*`.
      train: Whether to read the training split. An evaluation needs only the test
        split: without `train`, the training split is empty, its files are neither
        needed nor read, and no picture is looked for in both splits.

    Returns:
      The data set, with a training and a test split.

    Raises:
      DataError: If the set is unknown or cannot be read, its images or labels are not
        consistent, or an argument does not apply; the message says what was expected.
    """
    if callable(dataset):
        from xnor_jax.data import arrays

        if data_dir is not None:
            raise DataError(f"a function takes no data folder, got {data_dir}")
        if holdout is not None:
            raise DataError("a function returns a test split, and needs no holdout")
        found = arrays.from_function(dataset)
        return found if train else found.without_train()
    if dataset not in SOURCES:
        raise DataError(
            f"unknown data set {dataset!r}; expected one of {', '.join(SOURCES)}"
        )
    source = SOURCES[dataset]
    if source.streamed:
        if fit is None:
            raise DataError(
                f"{dataset} has pictures of any size; expected an image size"
            )
        if source.hub is None and data_dir is None:
            raise DataError(
                f"{dataset} needs a folder of class folders; give one with --data-dir"
            )
        from xnor_jax.data import streams

        return streams.open_set(source, data_dir, fit, holdout, train=train)
    if holdout is not None:
        raise DataError(f"{dataset} has a test split, and needs no holdout")
    if source.hub is None:
        if data_dir is not None:
            raise DataError(
                f"{dataset} is built in and takes no data folder, got {data_dir}"
            )
        from xnor_jax.data import digits

        found = digits.read(source)
        return found if train else found.without_train()
    from xnor_jax.data import arrays

    return arrays.from_pictures(source, data_dir, train=train)
