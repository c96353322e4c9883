"""Image sets that stay on disk: Grain pipelines from files to batches of pixels.

A batch is a pure function of the seed and its number. So neither an interruption nor
how many processes prepare batches changes one, and a run's position is its epoch.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
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

# At import, Grain warns of a jaxlib without hooks for its profiler.
_absl = logging.getLogger("absl")
_level = _absl.level
_absl.setLevel(logging.ERROR)
import grain  # noqa: E402

_absl.setLevel(_level)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which equal part of each batch is read here."""

    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class PictureSet:
    """A set that stays on disk."""

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
        """How many there are to train on."""
        return len(self.train)

    @property
    def test_images(self) -> int:
        """How many there are to test on."""
        return len(self.test)

    def check(self) -> None:
        """Look for damaged pictures, before a training that they would end.

        Each test picture is decoded, as an evaluation does; a training picture as far
        as is quick: see `pictures.verify`.

        Raises:
          DataError: If there are any; the message names the first and their number.
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
        """An epoch's batches `(images, labels)`; past its end comes the next epoch.

        Args:
          batch_size: Of all shards together, which it divides among.
          seed: Of the order and of the augmentation.
          augment: What happens to each picture.
          shard: Which rows of each batch to read.

        Returns:
          uint8 `[batch, H, W, C]` and int32 `[batch]`. In each epoch a picture comes at
          most once, in an order of its own; what is left of whole batches waits for the
          next shuffle.
        """
        rows = self._shuffled(batch_size, len(self.train) // batch_size, seed)
        prepare = _Augmented(self.source, self.fit, augment)
        return _batches(rows.random_map(prepare), batch_size, shard)

    def calibration_batches(
        self,
        batch_size: int,
        *,
        count: int,
        seed: int,
        shard: Shard = Shard(),  # noqa: B008
    ) -> grain.MapDataset:
        """The first `count` of an epoch's batches, prepared as for the test."""
        count = min(count, len(self.train) // batch_size)
        rows = self._shuffled(batch_size, count, seed)
        return _batches(rows.map(_Centred(self.source, self.fit)), batch_size, shard)

    def test_batches(
        self,
        batch_size: int,
        *,
        shard: Shard = Shard(),  # noqa: B008
    ) -> grain.MapDataset:
        """All test images in order; the last batch is filled up by rows of `BLANK`."""
        rows = grain.MapDataset.source(self.test).map(_Centred(self.source, self.fit))
        if blanks := -len(self.test) % batch_size:
            blank = grain.MapDataset.range(blanks).map(_Blank(self.image_shape))
            rows = grain.MapDataset.concatenate([rows, blank])
        return _batches(rows, batch_size, shard)

    def test_splits(self) -> Iterator[Split]:
        """The test images, as parts that fit in memory."""
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
) -> PictureSet:
    """Open a set in the hub's layout or of class folders; its pictures stay on disk.

    It is evaluated on `validation`, or, where there is none, on `test`.

    Args:
      source: Whose hub name is asked where there is no folder.
      data_dir: A folder.
      fit: The size of the images.
      holdout: Of class folders without a split, what is for the test.

    Raises:
      DataError: If it cannot be opened.
    """
    test = "validation", "test"
    found = open_rows(source, data_dir, test=test, holdout=holdout)
    return PictureSet(found.train, found.test, found.class_names, source, fit)


@contextlib.contextmanager
def reading(batches: grain.MapDataset, workers: int = 0) -> Iterator[Iterator[Any]]:
    """Iterate over batches, which are prepared ahead of who takes them.

    Args:
      batches: A batch an element.
      workers: Processes that prepare them; 0 for threads of this one, one a core.
    """
    if workers and not flags.FLAGS.is_parsed():
        # Grain asks a flag of its own before it starts a process.
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
        raise ValueError(f"a batch of {size} does not divide among {shard.count}")
    # Each is a shard's share of a batch, the shards' in turn.
    return rows.batch(size // shard.count)[shard.index :: shard.count]


@dataclasses.dataclass(frozen=True)
class _Augmented:
    source: Source
    fit: Fit
    how: Augment

    def __call__(self, row: Row, rng: np.random.Generator) -> Any:
        image = pictures.read(row.picture, len(self.source.mean), name=row.name)
        return pictures.augment(image, self.fit, self.how, rng), row.label


@dataclasses.dataclass(frozen=True)
class _Centred:
    source: Source
    fit: Fit

    def __call__(self, row: Row) -> Any:
        image = pictures.read(row.picture, len(self.source.mean), name=row.name)
        return pictures.to_array(pictures.centre(image, self.fit)), row.label


@dataclasses.dataclass(frozen=True)
class _Blank:
    image_shape: tuple[int, ...]

    def __call__(self, _: int) -> Any:
        return np.zeros(self.image_shape, np.uint8), np.int32(BLANK)


def deafen() -> None:
    """Make workers that this thread starts deaf to Ctrl-C: it is for this process."""
    # They inherit the mask. The first semaphore starts multiprocessing's tracker, and
    # that would clear it.
    multiprocessing.get_context("spawn").Event()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _start_worker(index: int, count: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
