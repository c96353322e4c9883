"""Rows of pictures in Parquet files, through Hugging Face `datasets`."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow.parquet

from xnor_jax.data.sets import DataError, Row, RowSet

# A file's split: the word that its name starts with, or else its folder's name.
_SPLIT = re.compile(r"(train|validation|val|test)(?![a-z])", re.IGNORECASE)
_T = TypeVar("_T")


class Table:
    """A split of rows in a `datasets.Dataset`."""

    def __init__(self, name: str, pictures: Any, labels: np.ndarray):
        self._name, self._pictures, self._labels = name, pictures, labels

    @property
    def labels(self) -> np.ndarray:
        """The class of each row, int32 `[N]`."""
        return self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        return self._row(index, self._pictures[index])

    def __iter__(self) -> Iterator[Row]:
        # One row at a time would be many times slower.
        for index, found in enumerate(self._pictures):
            yield self._row(index, found)

    def _row(self, index: int, found: dict[str, Any] | None) -> Row:
        name = f"{self._name}, row {index}"
        if not found or not (found["bytes"] or found["path"]):
            raise DataError(f"{name} has no picture")
        if found["path"]:
            name = f"{name} ({found['path']})"
        picture = found["bytes"] or found["path"]
        return Row(name, picture, self._labels[index])


def open_hub(name: str, test: Sequence[str]) -> RowSet:
    """Open a set of the Hugging Face hub.

    Args:
      name: The set's name there.
      test: Names of the test split; the first that exists and has labels is taken.

    Raises:
      DataError: If it cannot be opened.
    """
    mend = "the hub may be out of reach: give a folder with --data-dir"
    found = _reading(name, mend, lambda: datasets.load_dataset(name))
    return _row_set(name, found, test, mend)


def open_parquet(folder: Path, test: Sequence[str]) -> RowSet | None:
    """Open a folder of Parquet files in the layout of the hub.

    Args:
      folder: Holds `SPLIT-*.parquet` or `SPLIT/*.parquet`, at any depth.
      test: Names of the test split; the first that exists and has labels is taken.

    Returns:
      The set; None where there are no Parquet files.

    Raises:
      DataError: If they cannot be read, or are not one set.
    """
    every = [
        Path(place, name)
        for place, inner, names in os.walk(folder)
        if not inner.sort() and not Path(place).name.startswith(".")
        for name in sorted(names)
        if name.endswith(".parquet") and not name.startswith(".")
    ]
    if not every:
        return None
    where, mend = str(folder), "check the files"
    splits: dict[str, list[Path]] = {}
    for path in every:
        if word := _SPLIT.match(path.name) or _SPLIT.fullmatch(path.parent.name):
            name = word[1].lower()
            splits.setdefault("validation" if name == "val" else name, []).append(path)
    for name, files in splits.items():
        for path in files:
            if path.parent != files[0].parent:
                raise DataError(
                    f"{where} has two sets: {name} is in {files[0].parent} and in "
                    f"{path.parent}; give one of these folders"
                )
    wanted = {name: splits[name] for name in ("train", *test) if name in splits}
    _check_splits(where, wanted, test, [str(p.relative_to(folder)) for p in every])
    schemas = {
        path: _reading(str(path), mend, lambda path=path: _features(path))
        for files in wanted.values()
        for path in files
    }
    first, *others = schemas
    for path in others:
        if schemas[path] != schemas[first]:
            raise DataError(
                f"{path} has other columns or class names than {first}; expected the "
                "files of one set"
            )
    # datasets takes each path for a pattern.
    patterns = {
        name: [glob.escape(str(path.absolute())) for path in files]
        for name, files in wanted.items()
    }
    found = _reading(
        where, mend, lambda: datasets.load_dataset("parquet", data_files=patterns)
    )
    return _row_set(where, found, test, mend)


def _features(path: Path) -> datasets.Features:
    return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))


def _row_set(where: str, found: Any, test: Sequence[str], mend: str) -> RowSet:
    _check_splits(where, found, test, list(found))
    image, label = _columns(where, found["train"].features)
    names = tuple(found["train"].features[label].names)

    def table(split: str) -> Table:
        name = f"{where}, {split}"
        labels = _labels(name, found[split], label, len(names))
        encoded = found[split].cast_column(image, datasets.Image(decode=False))
        return Table(name, encoded[image], labels)

    def both() -> RowSet:
        held_out = _labelled(where, found, label, test)
        return RowSet(where, table("train"), table(held_out), names)

    return _reading(where, mend, both)


def _reading(where: str, mend: str, read: Callable[[], _T]) -> _T:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # datasets raises its readers' own, of any kind
        cause = error.__cause__ or error  # what the reader itself ran into
        reason = (str(cause).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"cannot read {where} ({type(cause).__name__}: {reason}); {mend}"
        ) from error


def _check_splits(
    where: str, found: Any, test: Sequence[str], names: Sequence[str]
) -> None:
    missing = None
    if "train" not in found:
        missing = "train"
    elif not any(name in found for name in test):
        missing = " or ".join(test)
    if missing:
        raise DataError(
            f"{where} has no split {missing}; expected train and {test[0]}, found "
            f"{', '.join(names[:8])}"
        )


def _labelled(where: str, found: Any, label: str, test: Sequence[str]) -> str:
    """The hub's ImageNet has a test split whose labels are secret: all are -1."""
    there = [name for name in test if name in found]
    for name in there:
        values = found[name][label][:] if label in found[name].features else []
        if not len(found[name]) or any(v is not None and v >= 0 for v in values):
            return name
    raise DataError(f"{where} has no labels in {' and '.join(there)}")


def _columns(where: str, features: Any) -> tuple[str, str]:
    def only(kind: type, what: str) -> str:
        found = [name for name, value in features.items() if isinstance(value, kind)]
        if len(found) != 1:
            columns = ", ".join(
                f"{name} ({getattr(value, 'dtype', None) or type(value).__name__})"
                for name, value in features.items()
            )
            raise DataError(
                f"{where} has {len(found)} {what} columns; expected one, found columns "
                f"{columns}"
            )
        return found[0]

    return only(datasets.Image, "image"), only(datasets.ClassLabel, "class label")


def _labels(name: str, table: Any, label: str, classes: int) -> np.ndarray:
    values = table[label][:]
    if not values:
        raise DataError(f"{name} has no rows; expected at least one")
    if None in values:
        raise DataError(f"{name} has no label in row {values.index(None)}")
    labels = np.asarray(values, np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        raise DataError(
            f"{name} has label {labels[wrong[0]]} in row {wrong[0]}; expected 0 to "
            f"{classes - 1}"
        )
    return labels.astype(np.int32)
