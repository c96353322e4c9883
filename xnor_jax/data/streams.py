"""Image data sets on disk: Grain pipelines from files to batches of pixels.

A batch is a pure function of the seed and its index: it does not depend on
interruptions or on the number of worker processes. A run's position is its epoch.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from xnor_jax.data import pictures
from xnor_jax.data._threads import in_threads
from xnor_jax.data.layouts import open_rows
from xnor_jax.data.sets import (
    BLANK,
    Augment,
    DataError,
    Fit,
    Holdout,
    Row,
    Rows,
    Source,
    Split,
)

# On import, Grain logs a warning if jaxlib has no hooks for its profiler.
_absl = logging.getLogger("absl")
_level = _absl.level
_absl.setLevel(logging.ERROR)
import grain  # noqa: E402

_absl.setLevel(_level)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The equal share of each batch that this process reads."""

    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """An image data set that stays on disk."""

    train: Rows
    test: Rows
    class_names: tuple[str, ...]
    source: Source
    fit: Fit

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width, channels."""
        return (self.fit.size, self.fit.size, len(self.source.mean))

    @property
    def train_images(self) -> int:
        """The number of training images."""
        return len(self.train)

    @property
    def test_images(self) -> int:
        """The number of test images."""
        return len(self.test)

    def check(self) -> None:
        """Check for damaged pictures, which would otherwise stop the training.

        Test pictures are decoded, as in evaluation; training pictures get the faster
        check of `pictures.verify`.

        Raises:
          DataError: If any picture is damaged; the message names the first and gives
            the number of the others.
        """
        channels = len(self.source.mean)
        broken: list[DataError] = []
        for rows, whole in ((self.train, False), (self.test, True)):

            def fault(index, rows=rows, whole=whole) -> DataError | None:
                try:
                    name, picture, _ = rows[index]
                    if whole:
                        pictures.read(picture, channels, name=name)
                    else:
                        pictures.verify(picture, name=name)
                except DataError as error:
                    return error

            broken += filter(None, in_threads(fault, range(len(rows))))
        pictures.refuse(broken)

    def train_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        augment: Augment,
        shard: Shard = Shard(),  # noqa: B008
    ) -> grain.MapDataset:
        """The batches `(images, labels)` of an epoch; indices past it are later epochs.

        Args:
          batch_size: Images per batch over all shards, a multiple of their number.
          seed: The seed of the order and of the augmentation.
          augment: The augmentation of each picture.
          shard: The share of each batch to read.

        Returns:
          uint8 `[batch, H, W, C]` and int32 `[batch]`. Each epoch has its own order and
          contains a picture at most once; an incomplete last batch is dropped.
        """
        rows = self._shuffled(batch_size, len(self.train) // batch_size, seed)
        rows = rows.random_map(partial(_augmented, self.source, self.fit, augment))
        return _batches(rows, batch_size, shard)

    def calibration_batches(
        self,
        batch_size: int,
        *,
        count: int,
        seed: int,
        shard: Shard = Shard(),  # noqa: B008
    ) -> grain.MapDataset:
        """`count` batches of training images, which are the same in each epoch.

        They are prepared as for the test.
        """
        count = min(count, len(self.train) // batch_size)
        chosen = self._shuffled(batch_size, count, seed)
        # A range repeats; a shuffled set has another order in each epoch.
        rows: Any = grain.MapDataset.range(len(chosen)).map(chosen.__getitem__)
        rows = rows.map(partial(_centred, self.source, self.fit))
        return _batches(rows, batch_size, shard)

    def test_batches(
        self,
        batch_size: int,
        *,
        shard: Shard = Shard(),  # noqa: B008
    ) -> grain.MapDataset:
        """All test images in order; rows with the label `BLANK` pad the last batch."""
        rows = grain.MapDataset.source(self.test)
        rows = rows.map(partial(_centred, self.source, self.fit))
        if blanks := -len(self.test) % batch_size:
            blank = grain.MapDataset.range(blanks).map(
                partial(_blank, self.image_shape)
            )
            rows = grain.MapDataset.concatenate([rows, blank])
        return _batches(rows, batch_size, shard)

    def test_splits(self) -> Iterator[Split]:
        """The test images in order, in parts that fit in memory."""
        with reading(self.test_batches(min(128, len(self.test)))) as batches:
            for images, labels in batches:
                real = labels != BLANK
                yield Split(images[real], labels[real])

    def _shuffled(self, batch_size: int, batches: int, seed: int) -> grain.MapDataset:
        rows = grain.MapDataset.source(self.train).seed(seed).shuffle()
        return rows[: batches * batch_size]


def open_set(
    source: Source,
    data_dir: str | Path | None,
    fit: Fit,
    holdout: Holdout | None = None,
    *,
    train: bool = True,
) -> PictureSet:
    """Open a data set whose pictures stay on disk.

    The test split is `validation`, or `test` if there is no labelled `validation`.

    Args:
      source: The data set.
      data_dir: A folder in the hub's layout or of class folders; None loads the set
        from the hub.
      fit: The size of the images.
      holdout: The part to hold out of class folders without a split.
      train: Whether to open the training split; without it, that split is empty.

    Raises:
      DataError: If the set cannot be opened.
    """
    test = "validation", "test"
    found = open_rows(source, data_dir, test=test, holdout=holdout, train=train)
    return PictureSet(found.train, found.test, found.class_names, source, fit)


@contextlib.contextmanager
def reading(batches: grain.MapDataset, workers: int = 0) -> Iterator[Iterator[Any]]:
    """Iterate over batches that are prepared in advance, in the background.

    Args:
      batches: The batches, one per element.
      workers: The number of processes that prepare batches; 0 for threads of this
        process, one per core up to 16.
    """
    if workers and not flags.FLAGS.is_parsed():
        # Grain reads one of its flags before it starts a process.
        flags.FLAGS.mark_as_parsed()
    threads = 0 if workers else min(os.cpu_count() or 1, 16)
    read = grain.ReadOptions(threads, threads + 2 if threads else 0)
    processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=2)
    ahead = batches.to_iter_dataset(read).mp_prefetch(processes, _start_worker)
    iterator = iter(ahead)
    try:
        yield iterator
    finally:
        iterator.close()


def _batches(rows: grain.MapDataset, size: int, shard: Shard) -> grain.MapDataset:
    if size % shard.count:
        raise ValueError(
            f"batch_size: expected a multiple of {shard.count}, the number of shards, "
            f"got {size}"
        )
    # Each element is one shard's share of a batch; the shards take turns.
    return rows.batch(size // shard.count)[shard.index :: shard.count]


def _augmented(
    source: Source, fit: Fit, how: Augment, row: Row, rng: np.random.Generator
) -> Any:
    image = pictures.read(row.picture, len(source.mean), name=row.name)
    return pictures.augment(image, fit, how, rng), row.label


def _centred(source: Source, fit: Fit, row: Row) -> Any:
    image = pictures.read(row.picture, len(source.mean), name=row.name)
    return pictures.to_array(pictures.centre(image, fit)), row.label


def _blank(image_shape: tuple[int, ...], _: int) -> Any:
    return np.zeros(image_shape, np.uint8), np.int32(BLANK)


def block_sigint() -> None:
    """Block Ctrl-C in the workers that this thread starts; this process handles it."""
    # Workers inherit the signal mask. The first semaphore starts multiprocessing's
    # resource tracker, which would clear the mask.
    multiprocessing.get_context("spawn").Event()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _start_worker(index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
