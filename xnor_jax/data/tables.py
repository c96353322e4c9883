"""Pictures in Parquet files, read with Hugging Face `datasets`."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet

from xnor_jax._words import described
from xnor_jax.data.sets import DataError, Row, RowSet

# A file's split: the word at the start of its name, or else its folder's name.
_SPLIT = re.compile(r"(train|validation|val|test)(?![a-z])", re.IGNORECASE)
_T = TypeVar("_T")


class Table:
    """A split whose rows are in a `datasets.Dataset`."""

    def __init__(self, name: str, pictures: Any, labels: np.ndarray):
        self._name, self._pictures, self.labels = name, pictures, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        return self._row(index, self._pictures[index])

    def __iter__(self) -> Iterator[Row]:
        # Indexing row by row would be many times slower.
        for index, found in enumerate(self._pictures):
            yield self._row(index, found)

    def _row(self, index: int, found: dict[str, Any] | None) -> Row:
        name = f"{self._name}, row {index}"
        if not found or not (found["bytes"] or found["path"]):
            raise DataError(f"{name} has no picture")
        if found["path"]:
            name = f"{name} ({found['path']})"
        picture = found["bytes"] or found["path"]
        return Row(name, picture, self.labels[index])


def open_hub(name: str, test: Sequence[str], *, train: bool = True) -> RowSet:
    """Open a data set from the Hugging Face hub.

    Args:
      name: The data set's name on the hub.
      test: Accepted names of the test split; the first that exists and has labels is
        used.
      train: Whether to open the training split; without it, that split is empty.

    Raises:
      DataError: If the set cannot be opened.
    """
    fix = "if the hub cannot be reached, give a folder with --data-dir"
    found = _reading(name, fix, lambda: datasets.load_dataset(name))
    return _row_set(name, found, test, fix, train)


def open_parquet(
    folder: Path, test: Sequence[str], *, train: bool = True
) -> RowSet | None:
    """Open a folder of Parquet files in the layout of the hub.

    Args:
      folder: The folder with `SPLIT-*.parquet` or `SPLIT/*.parquet`, at any depth.
      test: Accepted names of the test split; the first that exists and has labels is
        used.
      train: Whether to open the training split; without it, that split is empty, and
        need not exist.

    Returns:
      The set; None if there are no Parquet files.

    Raises:
      DataError: If the files cannot be read or do not form one data set.
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
    where, fix = str(folder), "check the files"
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
    asked = ("train", *test) if train else test
    wanted = {name: splits[name] for name in asked if name in splits}
    relative = [str(path.relative_to(folder)) for path in every]
    _check_splits(where, wanted, test, relative, train)
    schemas = {
        path: _reading(str(path), fix, lambda path=path: _features(path))
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
    # datasets treats each path as a glob pattern.
    patterns = {
        name: [glob.escape(str(path.absolute())) for path in files]
        for name, files in wanted.items()
    }
    found = _reading(
        where, fix, lambda: datasets.load_dataset("parquet", data_files=patterns)
    )
    return _row_set(where, found, test, fix, train)


def _features(path: Path) -> datasets.Features:
    return datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))


def _row_set(
    where: str, found: Any, test: Sequence[str], fix: str, train: bool
) -> RowSet:
    _check_splits(where, found, test, list(found), train)
    features = next(iter(found.values())).features  # those of every split
    image, label = _columns(where, features)
    names = tuple(features[label].names)

    def table(split: str) -> Table:
        name = f"{where}, {split}"
        if split == "train" and not train:
            return Table(name, (), np.empty(0, np.int32))
        labels = _labels(name, found[split], label, len(names))
        encoded = found[split].cast_column(image, datasets.Image(decode=False))
        return Table(name, encoded[image], labels)

    def both() -> RowSet:
        held_out = _labelled(where, found, label, test)
        return RowSet(where, table("train"), table(held_out), names)

    return _reading(where, fix, both)


def _reading(where: str, fix: str, read: Callable[[], _T]) -> _T:
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()  # of each retry, a warning
    try:
        return read()
    except DataError:
        raise
    except Exception as error:  # the readers raise exceptions of any type
        cause = error.__cause__ or error  # the reader's own exception
        raise DataError(f"cannot read {where} ({described(cause)}); {fix}") from error


def _check_splits(
    where: str, found: Any, test: Sequence[str], names: Sequence[str], train: bool
) -> None:
    missing = None
    if train and "train" not in found:
        missing = "train"
    elif not any(name in found for name in test):
        missing = " or ".join(test)
    if missing:
        raise DataError(
            f"{where} has no split {missing}; expected {'train and ' * train}{test[0]},"
            f" found {', '.join(names[:8])}"
        )


def _labelled(where: str, found: Any, label: str, test: Sequence[str]) -> str:
    """The first test split with labels; those of ImageNet's test split are all -1."""
    splits = [name for name in test if name in found]
    for name in splits:
        values = found[name][label][:] if label in found[name].features else []
        if not len(found[name]) or any(v is not None and v >= 0 for v in values):
            return name
    raise DataError(f"{where} has no labels in {' and '.join(splits)}")


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
