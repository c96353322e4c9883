"""The training loop: epochs, evaluation, checkpoints and figures."""

import dataclasses
import math
import sys
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike
from rich.console import Console

from xnor_jax import masks
from xnor_jax._words import counted
from xnor_jax.data import Dataset
from xnor_jax.data.streams import PictureSet
from xnor_jax.train import feeds, figures, network, processes, step
from xnor_jax.train.checkpoint import Checkpoints, History
from xnor_jax.train.devices import replicate
from xnor_jax.train.folder import (
    DATA_WAIT,
    RunError,
    RunInfo,
    open_folder,
    read_info,
    write_data_dir,
    write_metrics,
)
from xnor_jax.train.progress import Display
from xnor_jax.train.recipe import Recipe, RecipeError
from xnor_jax.train.step import Metrics, Trainer, TrainState


class Result(NamedTuple):
    """The result of a run."""

    folder: Path
    history: History  # one record per epoch
    seconds: float  # of this process
    trainer: Trainer
    state: TrainState  # after the last epoch


def train(
    info: RunInfo,
    dataset: Dataset | PictureSet,
    folder: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    mesh: Mesh | None = None,
    workers: int = 0,
    data_dir: str | Path | None = None,
) -> Result:
    """Train a recipe for all its epochs.

    The recipe determines the result: a run that is interrupted at any time and resumed
    ends with the same values as an uninterrupted one. If JAX runs in several processes,
    each of them calls this function; only the first one prints, and writes everything
    except the checkpoints.

    Args:
      info: The run: `RunInfo.of(name, recipe, dataset)`.
      dataset: The run's data set.
      folder: The folder for recipe, metrics, checkpoints, events and figure.
      resume: Whether to resume the run in the folder.
      console: The console to print to; None for standard output.
      mesh: The devices that share each batch, from `make_mesh`; None for one. The
        result is that of one device up to rounding, and a run may be resumed with
        another mesh.
      workers: The number of processes that prepare the batches of a data set on disk; 0
        for threads. It does not affect the result.
      data_dir: The data set's folder, if it has one, which `--resume` reads again.

    Returns:
      The history of all epochs, the time taken, the trainer and the final state.

    Raises:
      RunError: If the folder holds something else or cannot be written, the loss is not
        finite, or a run that the recipe names cannot be used.
      RecipeError: If a batch is larger than the training split, or the network cannot
        be built for such images.
    """
    begin = time.perf_counter()
    recipe = info.recipe
    console = console or Console()
    if info.steps_per_epoch < 1:
        raise RecipeError(
            f"expected at most {info.train_images}, the number of training images, got "
            f"{recipe.batch_size}",
            field="batch_size",
        )
    # Check that the network takes such images before creating a folder and verifying
    # all pictures.
    _abstract_network(info)
    if isinstance(dataset, PictureSet):
        dataset.check()
    checkpoints = Checkpoints(folder)
    history: History = []
    done = (checkpoints.newest() or 0) if resume else 0
    others = _others(info, first=not done)
    inputs = _checksums(dataset, others.get("teacher"))
    processes.check_equal(run=info, data_set=inputs, folder=folder.name)
    info = dataclasses.replace(info, inputs=inputs)

    def open_first():
        open_folder(folder, info, resume=resume)
        if data_dir is not None:
            write_data_dir(folder, data_dir)

    processes.open_together(folder, open_first)
    trainer, state = create(info, abstract=bool(done), **others)
    processes.check_equal(newest_checkpoint=done)
    first = processes.is_first()
    steps = counted(info.steps_per_epoch, "step")
    console.print(
        f"{info.name}: {counted(info.train_images, 'training image')}, "
        f"{counted(recipe.epochs, 'epoch')} of {steps}, seed {recipe.seed},\n"
        f"in {folder}",
        markup=False,
    )
    if done:
        state, history = checkpoints.restore(done, state)
        words = f"resuming after epoch {done} of {recipe.epochs}"
        console.print(f"{folder}: {words}", markup=False)
    elif resume:
        words = "no checkpoint yet; starting from the first epoch"
        console.print(f"{folder}: {words}", markup=False)

    state = replicate(state, mesh)
    trained_images = info.steps_per_epoch * recipe.batch_size
    display = Display(
        console,
        epochs=recipe.epochs,
        done=done,
        images_per_epoch=trained_images,
        batch_size=recipe.batch_size,
    )
    feed = feeds.make_feed(
        trainer, dataset, display.on_steps, mesh=mesh, done=done, workers=workers
    )
    events = None
    try:
        if first:
            if done:
                write_metrics(folder, history)
            events = figures.EventWriter(folder, done)
        with display, feed:
            for epoch in range(done + 1, recipe.epochs + 1):
                display.begin_epoch(epoch)
                epoch_begin = time.perf_counter()
                state, metrics, flips = feed.train_epoch(state, epoch)
                seconds = time.perf_counter() - epoch_begin
                _check_finite(recipe, epoch, "loss", metrics)
                _check_parameters(recipe, epoch, state)
                if recipe.calibration_batches:
                    state = state._replace(rest=feed.calibrate(state))
                test = feed.evaluate(state)
                _check_finite(recipe, epoch, "test loss", test)
                record = _record(
                    trainer,
                    state,
                    epoch,
                    metrics,
                    test,
                    flips,
                    trained_images / seconds,
                )
                if feed.waited is not None:
                    record[DATA_WAIT] = feed.waited / seconds
                history.append(record)
                checkpoints.save(epoch, state, history)
                if events:
                    write_metrics(folder, history)
                    events.write(record, figures.latent_weights(state, trainer.inner))
                display.end_epoch(record)
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror or error}; check free space "
            "and permissions, then resume with --resume"
        ) from error
    finally:
        # An interrupted call may still hold the lock that `close` would wait for.
        if events and not isinstance(sys.exception(), KeyboardInterrupt):
            events.close()
    if first:
        weights = figures.latent_weights(state, trainer.inner)
        report = figures.picture(figures.title(info), history, weights)
        figures.save(report, folder / "report.png")
    return Result(folder, history, time.perf_counter() - begin, trainer, state)


def create(
    info: RunInfo, *, abstract: bool = False, **others: Any
) -> tuple[Trainer, TrainState]:
    """Build a run's network and optimizer, and their state before the first step.

    Args:
      info: The run.
      abstract: Whether the state has shapes and dtypes only.
      **others: `teacher` and `initial`, if the recipe names them; see `step.create`.
        Without them a run can be read but not trained.
    """
    return step.create(
        info.recipe,
        info.source,
        image_shape=info.image_shape,
        classes=len(info.class_names),
        steps_per_epoch=info.steps_per_epoch,
        abstract=abstract,
        **others,
    )


def _others(info: RunInfo, *, first: bool) -> dict[str, Any]:
    """Restore the runs that the recipe names; `initial` only before the `first` epoch.

    Raises:
      RunError: If a run cannot be read or has other images or classes, or the initial
        run has another network.
    """

    def other(field: str) -> tuple[Trainer, TrainState]:
        folder = Path(getattr(info.recipe, field))
        try:
            found = read_info(folder)
            trainer, state, _ = restore(folder, found)
        except RunError as error:
            raise RunError(f"{field}: {error}") from error
        for kind in ("image_shape", "class_names", "source"):
            if getattr(found, kind) != getattr(info, kind):
                raise RunError(
                    f"{field}: expected a run on the same images and classes, got "
                    f"{folder}, which differs in {kind}"
                )
        return trainer, state

    others: dict[str, Any] = {}
    if info.recipe.teacher is not None:
        others["teacher"] = step.trained_model(*other("teacher"))
    if info.recipe.initial is not None and first:
        others["initial"] = other("initial")[1].params
        expected = nnx.state(_abstract_network(info), nnx.Param)
        if _shapes(others["initial"]) != _shapes(expected):
            raise RunError(
                f"initial: expected a run of the same network, got "
                f"{info.recipe.initial}, whose parameters have different names or "
                "shapes"
            )
    return others


def _abstract_network(info: RunInfo) -> nnx.Module:
    shape, classes = info.image_shape, len(info.class_names)
    build = network.builder(info.recipe, image_shape=shape, classes=classes)
    return network.abstract(info.recipe, build, shape, classes)


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(params)
    return {masks.path_string(path): leaf.shape for path, leaf in leaves}


def restore(
    folder: Path, info: RunInfo, *, best: bool = False
) -> tuple[Trainer, TrainState, History]:
    """Read the newest checkpoint of a run, or its best.

    Raises:
      RunError: If there is none, or it is damaged.
    """
    checkpoints = Checkpoints(folder)
    epoch = checkpoints.best() if best else checkpoints.newest()
    if epoch is None:
        raise RunError(f"{folder} holds no checkpoint yet; train for an epoch first")
    trainer, state = create(info, abstract=True)
    return trainer, *checkpoints.restore(epoch, state)


def _checksums(
    dataset: Dataset | PictureSet, teacher: nnx.Module | None
) -> dict[str, int]:
    """The CRC-32 of what a run is trained on, as in `RunInfo.inputs`."""
    found: dict[str, list[Any]] = {
        "training_labels": [dataset.train.labels],
        "test_labels": [dataset.test.labels],
    }
    if isinstance(dataset, Dataset):
        found["training_images"] = [dataset.train.images]
        found["test_images"] = [dataset.test.images]
    if teacher is not None:
        found["teacher"] = jax.tree.leaves(nnx.state(teacher, nnx.Param))
    return {name: _checksum(arrays) for name, arrays in found.items()}


def _checksum(arrays: Iterable[ArrayLike]) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def _check_finite(recipe: Recipe, epoch: int, name: str, metrics: Metrics) -> None:
    loss = float(metrics.loss)
    if not math.isfinite(loss):
        raise _diverged(recipe, f"the {name} of epoch {epoch} is {loss}")


def _check_parameters(recipe: Recipe, epoch: int, state: TrainState) -> None:
    """Check the values in front of a sign: the loss may be finite if they are NaN."""
    floats = {
        masks.path_string(path): leaf
        for tree in (state.params, state.rest)
        for path, leaf in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    for path, finite in zip(floats, _are_finite([*floats.values()]), strict=True):
        if not finite:
            what = f"after epoch {epoch}, {path} has values that are NaN or infinite"
            raise _diverged(recipe, what)


@jax.jit
def _are_finite(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in arrays]


def _diverged(recipe: Recipe, what: str) -> RunError:
    return RunError(
        f"{what}; lower learning_rate ({recipe.learning_rate:g}) or multiplier "
        f"({recipe.multiplier:g}) and start a new run in another folder"
    )


def _record(
    trainer: Trainer,
    state: TrainState,
    epoch: int,
    train: Metrics,
    test: Metrics,
    flips: Any,
    images_per_second: float,
) -> dict[str, Any]:
    kernels = figures.latent_weights(state, trainer.inner)
    flip_ratios = map(float, jax.tree.leaves(flips))
    ratios = dict(zip(kernels, flip_ratios, strict=True))
    sizes = {path: kernel.size for path, kernel in kernels.items()}
    flipped = sum(ratios[path] * sizes[path] for path in ratios)
    steps = int(state.step)
    return {
        "epoch": epoch,
        "step": steps,
        "train_loss": float(train.loss),
        "train_accuracy": float(train.accuracy),
        "test_loss": float(test.loss),
        "test_accuracy": float(test.accuracy),
        "learning_rate": float(jnp.asarray(trainer.schedule(steps - 1))),
        "flip_ratio": flipped / sum(sizes.values()),
        "images_per_second": images_per_second,
        "flip_ratios": ratios,
    }
