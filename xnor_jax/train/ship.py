"""A run's checkpoint as a packed network that knows what it was trained on."""

import dataclasses
from pathlib import Path

from flax import nnx

from xnor_jax import data
from xnor_jax.packing import Info, PackedModel, Preprocessing, pack, predict
from xnor_jax.train import loop
from xnor_jax.train.folder import RunError, read_info


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
    trainer, state, history = loop.restore(folder, run, best=best)
    model = nnx.merge(trainer.graphdef, state.params, state.rest)
    model.eval()
    try:
        packed = pack(model)
    except ValueError as error:
        raise RunError(f"{folder} cannot be packed: {error}") from error
    source, fit = data.SOURCES[run.recipe.dataset], run.recipe.fit
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
    dataset = data.load(run.recipe.dataset, data_dir, run.recipe.fit)
    accuracy = predict.evaluate(packed, dataset).accuracy
    info = dataclasses.replace(info, test_accuracy=accuracy)
    return dataclasses.replace(packed, info=info)
