"""A run's checkpoint as a packed network that knows what it was trained on."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from flax import nnx

from xnor_jax.packing import Info, PackedModel, Preprocessing, pack
from xnor_jax.train import loop, predict
from xnor_jax.train import recipe as recipes
from xnor_jax.train.folder import RunError, RunInfo, read_info


def pack_run(
    folder: Path, *, best: bool = False, data_dir: Path | None = None
) -> PackedModel:
    """Pack the newest checkpoint of a run, or its best.

    Args:
      folder: The run's folder.
      best: Whether to take the epoch of the highest test accuracy.
      data_dir: The data set's folder, to measure the packed network's test accuracy;
        None for what the run measured.

    Returns:
      The packed network; its `info` has the recipe's name, the preprocessing, the
      classes and the test accuracy.

    Raises:
      RunError: If there is no such run or checkpoint, it is damaged, or a float twin.
      DataError: If the data set cannot be read, or is another.
    """
    run = read_info(folder)
    if not run.recipe.binary:
        raise RunError(
            f"{folder} holds a float twin, which has no binary layers to pack; "
            "expected a run without --no-binary"
        )
    if run.recipe.precision != "1w1a":
        raise RunError(
            f"{folder} holds a run of precision {run.recipe.precision}, whose products "
            "are not of signs; expected 1w1a"
        )
    trainer, state, history = loop.restore(folder, run, best=best)
    try:
        packed = pack_model(loop.trained_model(trainer, state), run.image_shape)
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
    dataset = recipes.load_data(run.recipe, data_dir)
    accuracy = predict.evaluate(packed, dataset).accuracy
    info = dataclasses.replace(info, test_accuracy=accuracy)
    return dataclasses.replace(packed, info=info)


def obstacle(run: RunInfo) -> str | None:
    """Why the network of a run cannot be packed, or None; found by packing it.

    A registered model can be, and is not tried.
    """
    signs = run.recipe.binary and run.recipe.precision == "1w1a"
    if not signs or not callable(run.recipe.model):
        return None
    model = loop.trained_model(*loop.create(run))
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
    """Pack a model in evaluation, which may not tell its `image_shape` itself."""
    if hasattr(model, "image_shape"):
        return packer(model)
    noise = np.random.default_rng(0).normal(size=(2, *image_shape))
    return packer(model, example=noise.astype(np.float32))
