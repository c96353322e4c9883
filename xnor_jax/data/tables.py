"""Tables of pictures and labels in the layouts that Hugging Face `datasets` reads."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xnor_jax.data.sets import DataError, Source


class Table(NamedTuple):
    """One split; its pictures are still in their files."""

    name: str  # for errors
    pictures: Any  # column of a `datasets.Dataset`
    labels: np.ndarray  # int32 [N], each in [0, classes)


class Tables(NamedTuple):
    """A set's two splits."""

    where: str
    train: Table
    test: Table
    class_names: tuple[str, ...]


@contextlib.contextmanager
def open_tables(
    source: Source,
    data_dir: str | Path | None,
    *,
    test: Sequence[str],
    decode: bool = True,
) -> Iterator[Tables]:
    """Open a set; what is read within the `with` is told in a line if it fails.

    Args:
      source: Whose hub name is asked where there is no folder.
      data_dir: A folder in the layout of the hub, or of class folders.
      test: The names of the test split; the first that is there and has labels is it.
      decode: Whether pictures come as Pillow's images, or as paths and bytes.

    Raises:
      DataError: If it cannot be opened, or what is read within the `with` cannot be
        read; the message says what would be right.
    """
    import datasets

    if data_dir is not None and not Path(data_dir).is_dir():
        layout = f"in the layout of the hub's {source.hub}"
        raise DataError(
            f"no folder {data_dir}; expected one "
            f"{layout if source.hub else 'of class folders'}"
        )
    where = str(data_dir) if data_dir is not None else str(source.hub)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        found = datasets.load_dataset(where)
        if "train" not in found:
            raise _no_split(where, "train", ("train", *test), found)
        image, label = _columns(where, found["train"].features)
        for split in found:
            feature = datasets.Image(decode=decode)
            found[split] = found[split].cast_column(image, feature)
        names = tuple(found["train"].features[label].names)
        train, held_out = (
            _table(f"{where}, {split}", found[split], image, label, len(names))
            for split in ("train", _test_split(where, found, label, test))
        )
        yield Tables(where, train, held_out, names)
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


def _test_split(where: str, found: Any, label: str, names: Sequence[str]) -> str:
    """The hub's ImageNet has a test split whose labels are secret: all are -1."""
    there = [name for name in names if name in found]
    if not there:
        raise _no_split(where, " or ".join(names), ("train", *names), found)
    for name in there:
        if label in found[name].features and max(found[name][label][:], default=0) >= 0:
            return name
    raise DataError(f"{where} has no labels in {' and '.join(there)}")


def _no_split(where: str, name: str, names: Sequence[str], found: Any) -> DataError:
    return DataError(
        f"{where} has no split {name}; expected {' and '.join(names[:2])}, found "
        f"{', '.join(map(str, found))}"
    )


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


def _table(where: str, table: Any, image: str, label: str, classes: int) -> Table:
    labels = np.asarray(table[label][:], np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{where} has label {labels[wrong[0]]} in row {wrong[0]}; expected 0 to "
            f"{classes - 1}"
        )
    if not len(labels):
        raise DataError(f"{where} has no rows; expected at least one")
    return Table(where, table[image], labels.astype(np.int32))
