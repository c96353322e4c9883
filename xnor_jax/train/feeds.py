"""Input feeds of a run: images in memory, or batches read from disk."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xnor_jax._words import first_line
from xnor_jax.data import Augment, Dataset
from xnor_jax.data.streams import PictureSet, Shard, block_sigint, grain, reading
from xnor_jax.train import predict, step
from xnor_jax.train.devices import put_batch, replicate
from xnor_jax.train.folder import RunError
from xnor_jax.train.pieces import compile_in_thread
from xnor_jax.train.step import Metrics, Trainer, TrainState

OnSteps = Callable[[int, Metrics], None]  # steps of the epoch so far, mean metrics


class Feed(Protocol):
    """The three passes of an epoch, called in this order, epoch by epoch."""

    waited: float | None
    """The seconds of the last `train_epoch` for which the devices waited for data; None
    for images in memory."""

    def train_epoch(
        self, state: TrainState, epoch: int
    ) -> tuple[TrainState, Metrics, Any]:
        """Train for an epoch; return the state and the mean metrics and flip ratios."""
        ...

    def calibrate(self, state: TrainState) -> Any:
        """Re-estimate BatchNorm's statistics; return the new `rest`.

        The images are the same after every epoch, so that two epochs differ by their
        weights alone.
        """
        ...

    def evaluate(self, state: TrainState) -> Metrics:
        """Return the mean metrics over the test images, each counted once."""
        ...

    def __enter__(self) -> "Feed":
        """Start reading."""
        ...

    def __exit__(self, *error: object) -> None:
        """Stop reading."""
        ...


def make_feed(
    trainer: Trainer,
    dataset: Dataset | PictureSet,
    on_steps: OnSteps,
    *,
    mesh: Mesh | None,
    done: int,
    workers: int,
) -> Feed:
    """Make the feed for a data set.

    Args:
      trainer: The network, optimizer and schedule.
      dataset: The images.
      on_steps: Called repeatedly with the number of steps of the epoch so far and the
        means of their metrics.
      mesh: The devices that share each batch; None for one.
      done: The number of completed epochs.
      workers: The number of processes that prepare the batches of a data set on disk; 0
        for threads.
    """
    if isinstance(dataset, PictureSet):
        return Streamed(
            trainer, dataset, on_steps, mesh=mesh, done=done, workers=workers
        )
    return InMemory(trainer, dataset, on_steps, mesh=mesh)


def evaluate(
    trainer: Trainer, state: TrainState, dataset: Dataset | PictureSet
) -> tuple[Metrics, int]:
    """Return the mean metrics over a data set's test images, and their number."""
    if isinstance(dataset, PictureSet):
        batches = dataset.test_batches(trainer.recipe.batch_size)
        with Prefetcher(batches) as prefetcher:
            program = step.make_evaluate_batch(trainer)
            metrics = _evaluate(program, state, prefetcher, len(batches))
    else:
        program = step.make_evaluate(trainer)
        metrics = program(state, *map(jnp.asarray, dataset.test))
    return metrics, dataset.test_images


def logits(trainer: Trainer, state: TrainState) -> Callable[[np.ndarray], np.ndarray]:
    """Return a state's network, from images, uint8 `[N, H, W, C]`, to logits."""
    # The weights are arguments: XLA would spend seconds folding constants.
    compute = jax.jit(partial(step.evaluation_logits, trainer))
    function = partial(compute, state)
    return lambda images: predict.in_batches(function, images)


class InMemory:
    """A feed of images in memory: compiled loops gather their own batches."""

    waited: float | None = None

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        on_steps: OnSteps,
        *,
        mesh: Mesh | None,
    ):
        self._train, self._test = replicate(
            jax.tree.map(jnp.asarray, (dataset.train, dataset.test)), mesh
        )
        self._key = replicate(jax.random.key(trainer.recipe.seed), mesh)
        self._train_epoch = step.make_train_epoch(trainer, on_steps, mesh=mesh)
        self._calibrate = step.make_calibrate(trainer, mesh=mesh)
        self._evaluate = step.make_evaluate(trainer, mesh=mesh)

    def __enter__(self) -> "InMemory":
        """Do nothing: the images are in memory."""
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""

    def train_epoch(
        self, state: TrainState, epoch: int
    ) -> tuple[TrainState, Metrics, Any]:
        """Train for an epoch; return the state and the mean metrics and flip ratios."""
        return self._train_epoch(state, *self._train, self._keys(epoch)[0])

    def calibrate(self, state: TrainState) -> Any:
        """Re-estimate BatchNorm's statistics; return the new `rest`."""
        images = self._train.images
        return self._calibrate(state, images, self._keys(0)[1])

    def evaluate(self, state: TrainState) -> Metrics:
        """Return the mean metrics over the test images, each counted once."""
        return self._evaluate(state, *self._test)

    def _keys(self, epoch: int) -> jax.Array:
        return jax.random.split(jax.random.fold_in(self._key, epoch))


class Streamed:
    """A feed of images on disk: a jitted step per batch, with the next one prefetched.

    The batches of all passes and epochs form one sequence, so prefetching continues
    from one pass to the next, and the epoch determines a run's position in it.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: PictureSet,
        on_steps: OnSteps,
        *,
        mesh: Mesh | None,
        done: int,
        workers: int,
    ):
        recipe = trainer.recipe
        size, seed = recipe.batch_size, recipe.seed
        shard = Shard(jax.process_index(), jax.process_count())
        augment = Augment(recipe.resize_crop, recipe.shift, recipe.flip)
        passes = [
            dataset.train_batches(size, seed=seed, augment=augment, shard=shard),
            dataset.calibration_batches(
                size, count=recipe.calibration_batches, seed=seed, shard=shard
            ),
            dataset.test_batches(size, shard=shard),
        ]
        self._steps, self._calibrations, self._tests = map(len, passes)
        epoch = grain.MapDataset.concatenate([part for part in passes if len(part)])
        remaining = epoch.repeat(recipe.epochs)[done * len(epoch) :]
        self._batches = Prefetcher(remaining, mesh=mesh, workers=workers)
        self._on_steps = on_steps
        train_batch = step.make_train_batch(trainer, mesh=mesh)
        self._train_batch = compile_in_thread(train_batch)
        self._statistics = step.make_batch_statistics(trainer, mesh=mesh)
        self._evaluate = step.make_evaluate_batch(trainer, mesh=mesh)
        self._mesh = mesh
        self.waited: float | None = None

    def __enter__(self) -> "Streamed":
        """Start preparing batches."""
        self._batches.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the threads and processes that prepare batches."""
        self._batches.__exit__(*error)

    def train_epoch(
        self, state: TrainState, epoch: int
    ) -> tuple[TrainState, Metrics, Any]:
        """Train for an epoch; return the state and the mean metrics and flip ratios."""
        del epoch  # given by the position in the sequence
        before = self._batches.waited
        total = replicate(step.zero_total(state), self._mesh)
        running = None
        for at in range(1, self._steps + 1):
            batch = self._batches.take(running)
            state, total, metrics = self._train_batch(state, total, *batch)
            # At most two steps are in flight: each holds a batch.
            jax.block_until_ready(running)
            running = metrics
            if at % 10 == 0:
                self._on_steps(at, step.means(total[0], at))
        jax.block_until_ready(total)
        self.waited = self._batches.waited - before
        return state, *step.means(total, self._steps)

    def calibrate(self, state: TrainState) -> Any:
        """Re-estimate BatchNorm's statistics; return the new `rest`."""
        found: list[Any] = []
        for _ in range(self._calibrations):
            images, _ = self._batches.take(found[-1:])
            jax.block_until_ready(found[-1:])
            found.append(self._statistics(state, images))
        return step.merge_statistics(state.rest, found)

    def evaluate(self, state: TrainState) -> Metrics:
        """Return the mean metrics over the test images, each counted once."""
        return _evaluate(self._evaluate, state, self._batches, self._tests)


class Prefetcher:
    """Batches on the devices, with the next one prefetched during each step.

    Args:
      batches: One batch per element.
      mesh: The devices that share each batch; None for one.
      workers: The number of processes that prepare batches; 0 for threads.
    """

    def __init__(
        self, batches: grain.MapDataset, *, mesh: Mesh | None = None, workers: int = 0
    ):
        self.waited = 0.0
        self._batches, self._mesh, self._workers = batches, mesh, workers
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Prefetcher":
        """Start preparing batches."""
        self._iterator = self._open.enter_context(reading(self._batches, self._workers))
        # Exited first: its thread may be waiting for a worker.
        initializer = block_sigint if self._workers else None
        pool = ThreadPoolExecutor(1, initializer=initializer)
        self._pool = self._open.enter_context(pool)
        self._next = self._pool.submit(self._pull)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop preparing batches."""
        self._open.close()
        # The iterator owns memory shared with the workers, and after an interrupt this
        # object may be referenced until the process ends.
        del self._iterator, self._next

    def take(self, running: Any) -> Any:
        """Return the next batch.

        Args:
          running: Arrays that the devices are still computing; `waited` counts the time
            from when they are ready until the batch is.
        """
        if not self._next.done():
            jax.block_until_ready(running)
            begin = time.perf_counter()
            wait([self._next])
            self.waited += time.perf_counter() - begin
        batch = self._next.result()
        self._next = self._pool.submit(self._pull)
        return batch

    def _pull(self) -> Any:
        try:
            batch = next(self._iterator, None)
        except RuntimeError as error:  # from Grain, when a worker has died
            raise RunError(
                f"cannot read more images: {first_line(error)}; free memory or lower "
                "--workers, then resume with --resume"
            ) from error
        if batch is None:
            return None
        # A copy: a worker's batch is in shared memory, which must be released at once.
        return put_batch(jax.tree.map(np.array, batch), self._mesh)


def _evaluate(
    program: Callable[..., Any], state: TrainState, batches: Prefetcher, count: int
) -> Metrics:
    total = None
    for _ in range(count):
        images, labels = batches.take(total)
        jax.block_until_ready(total)
        total = program(state, total, images, labels)
    loss, right, images = jax.block_until_ready(total)
    return Metrics(loss / images, right / images)
