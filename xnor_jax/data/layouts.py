"""The layouts that a set is read from: class folders, Parquet files, the hub."""

from collections.abc import Sequence
from pathlib import Path

from xnor_jax.data.sets import DataError, Holdout, RowSet, Source


def open_rows(
    source: Source,
    data_dir: str | Path | None,
    *,
    test: Sequence[str],
    holdout: Holdout | None = None,
) -> RowSet:
    """Open a set, its pictures still in their files.

    Args:
      source: Its hub name is asked where there is no folder.
      data_dir: A folder in the layout of the hub, or of class folders.
      test: Names of the test split; the first that exists and has labels is taken.
      holdout: Of class folders without a split, what is for the test.

    Raises:
      DataError: If it cannot be opened; the message says what would be right.
    """
    if data_dir is None:
        from xnor_jax.data import tables

        return tables.open_hub(str(source.hub), test)
    folder = Path(data_dir)
    layout = f"in the layout of the hub's {source.hub}" if source.hub else ""
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}; expected one {layout or 'of class folders'}"
        )
    from xnor_jax.data import class_folders

    if holdout is not None:
        return class_folders.open_unsplit(folder, test, holdout)
    found = class_folders.open_folders(folder, test)
    if found is None:
        from xnor_jax.data import tables

        found = tables.open_parquet(folder, test)
    if found is None:
        there = sorted(path.name for path in folder.iterdir())
        raise DataError(
            f"{folder} has no folder train; expected train/CLASS/PICTURE and "
            f"{test[0]}/CLASS/PICTURE, or Parquet files train-*.parquet and "
            f"{test[0]}-*.parquet, found {', '.join(there[:8]) or 'nothing'}"
            f"{class_folders.hint(folder, test)}"
        )
    return found
