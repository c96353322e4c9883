"""Class folders: `train/CLASS/PICTURE` and `validation/CLASS/PICTURE`, or `CLASS/…`.

The exact name of the first folder is the split, that of the second the class. A picture
outside a class folder, or anything but a picture inside one, raises an error that names
it. Hidden files and the files that file managers leave behind are ignored.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from xnor_jax._words import counted
from xnor_jax.data import pictures
from xnor_jax.data._threads import in_threads
from xnor_jax.data.sets import DataError, Holdout, Row, RowSet

_IGNORED = ("thumbs.db", "ehthumbs.db", "desktop.ini")
_LAYOUT = "expected train/CLASS/PICTURE and {}/CLASS/PICTURE"
_LONGEST = 200  # characters; the limit of a packed file
_SAMPLE = 4096


class Files:
    """A split whose rows are files."""

    def __init__(self, paths: list[str], labels: list[int]):
        # One array: a list of a million paths would be costly in each worker process.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        path = os.fsdecode(self._paths[index])
        return Row(path, path, self.labels[index])

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def open_folders(
    folder: Path, test: Sequence[str], *, train: bool = True
) -> RowSet | None:
    """Open a training and a test split of class folders.

    Args:
      folder: The folder that holds `train` and the test split.
      test: Accepted names of the test split; the first that exists is used. `val` is an
        alias of `validation`.
      train: Whether to open the training split; without it, that split is empty, and
        need not exist.

    Returns:
      The set, with classes sorted by name and pictures by path; None if there is no
      such split, or if it holds Parquet files.

    Raises:
      DataError: If the folder does not fit the layout, the splits differ in their
        classes, or a picture is in both.
    """
    try:
        splits = {entry.name: entry for entry in _entries(folder) if entry.is_dir()}
        wanted = ("train",) if train else ("train", *test, "val")
        first = next((name for name in wanted if name in splits), None)
        if first is None or any(
            entry.name.endswith(".parquet") for entry in _entries(folder / first)
        ):
            return None
        held_out = _test_split(folder, splits, test)
        layout = _LAYOUT.format(held_out)
        training = _classes(folder / "train", layout) if train else None
        validation = _classes(folder / held_out, layout)
        if training is not None:
            _check_classes(folder, held_out, training, validation)
        if not any(validation.values()):
            raise DataError(
                f"{folder}/{held_out} has no pictures; expected at least one"
            )
        names = sorted(validation)
        rows = Files([], []) if training is None else _files(training, names)
        held_out_rows = _files(validation, names)
        _check_disjoint(rows, held_out_rows)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from error
    return RowSet(str(folder), rows, held_out_rows, tuple(names))


def open_unsplit(
    folder: Path, test: Sequence[str], holdout: Holdout, *, train: bool = True
) -> RowSet:
    """Open class folders without a split, and hold out a part of each class.

    The selection depends only on the names and on `holdout`.

    Args:
      folder: The folder that holds the class folders.
      test: Names of a test split, to suggest another folder in an error.
      holdout: The share of each class to hold out, and the seed.
      train: Whether to open the training split; without it, that split is empty.

    Raises:
      DataError: If the folder already has a split or does not fit the layout, there are
        fewer than two classes, a class has fewer than two pictures, or a picture would
        be in both splits.
    """
    try:
        if (folder / "train").is_dir() and any(
            entry.is_dir() for entry in _entries(folder / "train")
        ):
            raise DataError(
                f"{folder} already has a split: {folder}/train contains class folders; "
                "expected none with --validation-share"
            )
        try:
            classes = _classes(folder, "expected CLASS/PICTURE")
            if len(classes) < 2:
                raise DataError(
                    f"{folder} has {counted(len(classes), 'class folder')}; expected "
                    "at least two"
                )
        except DataError as error:
            raise DataError(f"{error}{_meant(folder, test)}") from None
        names = sorted(classes)
        parts: tuple[dict[str, list[str]], dict[str, list[str]]] = {}, {}
        for label, name in enumerate(names):
            paths = classes[name]
            if len(paths) < 2:
                raise DataError(
                    f"{folder}/{name} has {counted(len(paths), 'picture')}; expected "
                    "at least two, one of them for the test split"
                )
            count = min(max(round(holdout.share * len(paths)), 1), len(paths) - 1)
            rng = np.random.default_rng([holdout.seed, label])
            order = [paths[at] for at in rng.permutation(len(paths))]
            parts[0][name], parts[1][name] = order[count:], order[:count]
        rows = _files(parts[0], names) if train else Files([], [])
        held_out = _files(parts[1], names)
        _check_disjoint(rows, held_out)
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or folder}: {error.strerror or error}"
        ) from error
    return RowSet(str(folder), rows, held_out, tuple(names))


def hint(folder: Path, test: Sequence[str], *, train: bool = True) -> str:
    """The end of an error message about a folder without a data set: a suggestion."""
    if _is_unsplit(folder):
        if not train:
            return (
                "; if its folders are the classes, give --validation-share and --seed "
                "as in the training"
            )
        return (
            "; to use its folders as classes and hold out a fifth of each, train with "
            "--validation-share 0.2"
        )
    return _meant(folder, test)


def _meant(folder: Path, test: Sequence[str]) -> str:
    sets = [
        entry.path
        for entry in _entries(folder)
        if entry.is_dir() and _is_set(Path(entry.path), test)
    ]
    return f"; did you mean {sets[0]}?" if len(sets) == 1 else ""


def _is_set(folder: Path, test: Sequence[str]) -> bool:
    names = {entry.name for entry in _entries(folder) if entry.is_dir()}
    return bool("train" in names and names & {*test, "val"}) or _is_unsplit(folder)


def _is_unsplit(folder: Path) -> bool:
    """Whether at least two subfolders hold pictures."""
    suffixes = pictures.suffixes()
    return 1 < sum(
        any(Path(found.name).suffix.lower() in suffixes for found in _entries(entry))
        for entry in _entries(folder)
        if entry.is_dir()
    )


def _entries(folder: str | Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return sorted(
            (
                entry
                for entry in found
                if not entry.name.startswith(".") and entry.name.lower() not in _IGNORED
            ),
            key=lambda entry: entry.name,
        )


def _test_split(
    folder: Path, splits: dict[str, os.DirEntry[str]], test: Sequence[str]
) -> str:
    for name in test:
        aliases = ("validation", "val") if name == "validation" else (name,)
        found = [alias for alias in aliases if alias in splits]
        if len(found) > 1:
            raise DataError(f"{folder} has both {' and '.join(found)}; expected one")
        if found:
            return found[0]
    raise DataError(
        f"{folder} has no split {' or '.join(test)}; {_LAYOUT.format(test[0])}, found "
        f"{', '.join(list(splits)[:8])}"
    )


def _classes(split: Path, layout: str) -> dict[str, list[str]]:
    """The paths of the pictures of each class."""
    suffixes = pictures.suffixes()
    found: dict[str, list[str]] = {}
    for entry in _entries(split):
        if not entry.is_dir():
            _check_exists(entry)
            if Path(entry.name).suffix.lower() in suffixes:
                raise DataError(f"{entry.path} is not in a class folder; {layout}")
            continue
        if not entry.name.isprintable() or len(entry.name) > _LONGEST:
            raise DataError(
                f"{split} has a class folder {ascii(entry.name)}; expected a name of "
                f"at most {_LONGEST} printable characters in UTF-8"
            )
        found[entry.name] = []
        for picture in _entries(entry.path):
            if picture.is_dir():
                raise DataError(f"{picture.path} is nested too deep; {layout}")
            _check_exists(picture)
            suffix = Path(picture.name).suffix
            if suffix.lower() not in suffixes:
                raise DataError(
                    f"{picture.path}: expected the suffix of a picture that Pillow "
                    f"reads, got {suffix!r}; convert or remove it"
                )
            found[entry.name].append(picture.path)
    return found


def _check_exists(entry: os.DirEntry[str]) -> None:
    if not entry.is_file():
        broken = entry.is_symlink()
        kind = "a broken symbolic link" if broken else "not a regular file"
        raise DataError(f"{entry.path} is {kind}; expected a picture")


def _check_classes(
    folder: Path,
    held_out: str,
    train: dict[str, list[str]],
    validation: dict[str, list[str]],
) -> None:
    if len(train) < 2:
        raise DataError(
            f"{folder}/train has {counted(len(train), 'class folder')}"
            f"{''.join(f' ({name})' for name in train)}; expected at least two"
        )
    for name, paths in train.items():
        if not paths:
            raise DataError(
                f"{folder}/train/{name} has no pictures; expected at least one"
            )
        if name not in validation:
            raise DataError(
                f"{folder}/train has a class {name}, which is missing in "
                f"{folder}/{held_out}; add an empty folder if it has no test pictures"
            )
    for name in validation:
        if name not in train:
            raise DataError(
                f"{folder}/{held_out} has a class {name}, which is missing in "
                f"{folder}/train"
            )


def _files(classes: dict[str, list[str]], names: list[str]) -> Files:
    labels = {path: label for label, name in enumerate(names) for path in classes[name]}
    paths = sorted(labels)
    return Files(paths, [labels[path] for path in paths])


def _check_disjoint(train: Files, test: Files) -> None:
    """Raise an error if a picture is in both splits.

    Files of equal size are compared by their middle bytes, and those that agree there
    in full: few files are read twice.
    """
    left = [[row.name for row in files] for files in (train, test)]
    keys: list[list[Any]] = []
    for read in (os.path.getsize, _middle, _digest):
        keys = [list(in_threads(read, paths)) for paths in left]
        shared = set(keys[0]).intersection(keys[1])
        kept = [[key in shared for key in each] for each in keys]
        left = [list(compress(*each)) for each in zip(left, kept, strict=True)]
        keys = [list(compress(*each)) for each in zip(keys, kept, strict=True)]
    if left[0]:
        twin = left[1][keys[1].index(keys[0][0])]
        more = f" (and {len(left[0]) - 1} more)" if len(left[0]) > 1 else ""
        raise DataError(
            f"{left[0][0]} and {twin} are the same picture{more}; expected none in "
            "both splits"
        )


def _middle(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size // 2 - _SAMPLE // 2))
        return hashlib.blake2b(file.read(_SAMPLE), digest_size=16).digest()


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
