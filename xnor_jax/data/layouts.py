"""Layouts of data sets: class folders, Parquet files and the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path

from xnor_jax.data.sets import DataError, Holdout, RowSet, Source


def open_rows(
    source: Source,
    data_dir: str | Path | None,
    *,
    test: Sequence[str],
    holdout: Holdout | None = None,
    train: bool = True,
) -> RowSet:
    """Open a data set without decoding its pictures.

    Args:
      source: The data set.
      data_dir: A folder in the hub's layout or of class folders; None loads the set
        from the hub.
      test: Accepted names of the test split; the first that exists and has labels is
        used.
      holdout: The part to hold out of class folders without a split.
      train: Whether to open the training split; without it, that split is empty, and
        need not exist.

    Raises:
      DataError: If the set cannot be opened; the message says what was expected.
    """
    if data_dir is None:
        from xnor_jax.data import tables

        return tables.open_hub(str(source.hub), test, train=train)
    folder = Path(data_dir)
    if not folder.is_dir():
        layout = f"in the layout of the hub's {source.hub}, or " if source.hub else ""
        raise DataError(f"no folder {folder}; expected one {layout}of class folders")
    from xnor_jax.data import class_folders

    if holdout is not None:
        return class_folders.open_unsplit(folder, test, holdout, train=train)
    found = class_folders.open_folders(folder, test, train=train)
    if found is None:
        from xnor_jax.data import tables

        found = tables.open_parquet(folder, test, train=train)
    if found is None:
        names = sorted(path.name for path in folder.iterdir())
        needed = ("train", test[0]) if train else (test[0],)
        pictures, files = (
            " and ".join(split + rest for split in needed)
            for rest in ("/CLASS/PICTURE", "-*.parquet")
        )
        raise DataError(
            f"{folder} has no folder {needed[0]}; expected {pictures}, or Parquet "
            f"files {files}, found {', '.join(names[:8]) or 'nothing'}"
            f"{class_folders.hint(folder, test, train=train)}"
        )
    return found
