"""Packing a run's checkpoint, with a description of its training data."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from xnor_jax.packing import Info, PackedModel, Preprocessing, pack
from xnor_jax.train import loop, predict, step
from xnor_jax.train import recipe as recipes
from xnor_jax.train.folder import RunError, RunInfo, read_info


def pack_run(
    folder: Path, *, best: bool = False, data_dir: Path | None = None
) -> PackedModel:
    """Pack the newest checkpoint of a run, or its best.

    Args:
      folder: The run's folder.
      best: Whether to take the epoch with the highest test accuracy.
      data_dir: The data set's folder, to measure the packed network's test accuracy;
        None for the run's own measurement.

    Returns:
      The packed network; its `info` has the run's name, the preprocessing, the class
      names, the test accuracy and the name of the data set.

    Raises:
      RunError: If there is no such run or checkpoint, it is damaged, or it cannot be
        packed, such as a float twin.
      DataError: If the data set cannot be read, or is not the run's.
    """
    run = read_info(folder)
    if not run.recipe.binary:
        raise RunError(
            f"{folder} holds a float twin, which has no binary layers to pack; "
            "expected a run without --no-binary"
        )
    if run.recipe.precision != "1w1a":
        raise RunError(
            f"{folder} holds a run of precision {run.recipe.precision}, which does "
            "not multiply signs; expected 1w1a"
        )
    trainer, state, history = loop.restore(folder, run, best=best)
    try:
        packed = pack_model(step.trained_model(trainer, state), run.image_shape)
    except (ValueError, TypeError) as error:
        raise RunError(f"{folder} cannot be packed: {error}") from error
    source, fit = run.source, run.recipe.fit
    resize = None if fit is None else fit.resize
    info = Info(
        name=run.name,
        preprocessing=Preprocessing(source.mean, source.std, resize),
        class_names=run.class_names,
        test_accuracy=history[-1]["test_accuracy"],
        dataset=source.name,
    )
    packed = dataclasses.replace(packed, info=info)
    if data_dir is None:
        return packed
    dataset = recipes.load_data(run.recipe, data_dir, train=False)
    accuracy = predict.evaluate(packed, dataset).accuracy
    info = dataclasses.replace(info, test_accuracy=accuracy)
    return dataclasses.replace(packed, info=info)


def why_not_packable(run: RunInfo) -> str | None:
    """Return why a run's network cannot be packed; None if it can or is not tried.

    Registered models, which can be packed, float twins and precisions other than 1w1a
    are not tried.
    """
    signs = run.recipe.binary and run.recipe.precision == "1w1a"
    if not signs or not callable(run.recipe.model):
        return None
    model = step.trained_model(*loop.create(run))
    try:
        pack_model(model, run.image_shape)
    except (ValueError, TypeError) as error:
        return str(error).removeprefix("pack: ")
    return None


def pack_model(
    model: nnx.Module,
    image_shape: tuple[int, ...],
    packer: Callable[..., PackedModel] = pack,
) -> PackedModel:
    """Pack a model in evaluation mode, with an example if it has no `image_shape`."""
    if hasattr(model, "image_shape"):
        return packer(model)
    noise = np.random.default_rng(0).normal(size=(2, *image_shape))
    return packer(model, example=noise.astype(np.float32))
