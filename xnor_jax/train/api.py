"""Training from Python: `xnor-jax train` as functions that return the model."""

import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from xnor_jax._words import counted
from xnor_jax.train import folder as folders
from xnor_jax.train import loop, processes, ship, step
from xnor_jax.train import recipe as recipes
from xnor_jax.train.checkpoint import History, best_record
from xnor_jax.train.devices import make_mesh
from xnor_jax.train.folder import RunError, RunInfo, RunWarning
from xnor_jax.train.recipe import Recipe


class Run(NamedTuple):
    """A completed run."""

    folder: Path
    history: History  # one record per epoch: `metrics.jsonl` and `flip_ratios`
    model: nnx.Module  # after the last epoch, in evaluation mode


def run(
    recipe: Recipe | str,
    *,
    name: str | None = None,
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    resume: bool = False,
    devices: int | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> Run:
    """Train a recipe for all its epochs, as `xnor-jax train` does.

    A KeyboardInterrupt leaves the checkpoints of the completed epochs.

    Args:
      recipe: A recipe, a preset's name, or MODULE:NAME.
      name: The run's name. If it is the recipe's MODULE:NAME, the commands can import
        custom parts without a name, such as lambdas. None for the string passed as
        `recipe`, or for the names of data set and model, `DATASET-MODEL`.
      output: The run's folder. None for `runs/NAME`, or the next free `runs/NAME-2`, …;
        with `resume`, for the newest of these.
      data_dir: The data set's folder; None reads it from the Hugging Face hub.
      resume: Whether to resume the run in the folder.
      devices: The number of JAX devices that share each batch; must divide the batch
        size. None for one device, or for all if there are several processes.
      workers: The number of processes that prepare batches of a data set on disk; 0 for
        threads.
      console: The console for the command's output; None prints nothing.

    Returns:
      The folder, the history of all epochs, and the trained model.

    Raises:
      RecipeError: If the recipe cannot be trained.
      DataError: If the data set cannot be read.
      RunError: If the folder holds something else or cannot be written, or the loss is
        not finite.

    Examples:
      >>> import xnor_jax as xnor
      >>> recipe = xnor.train.Recipe(dataset="digits", model="lenet5", epochs=40)
      >>> run = xnor.train.run(recipe, output="runs/mine")  # doctest: +SKIP
      >>> run.history[-1]["test_accuracy"]  # doctest: +SKIP
      0.9888888597488403
    """
    name, recipe = _named(recipe, name)
    folder = Path(output) if output else folders.default_folder(name, resume=resume)
    recipes.check_machine(recipe, devices, workers)
    mesh = make_mesh(devices, recipe.batch_size)
    dataset = recipes.load_data(recipe, data_dir)
    given = {"mesh": mesh, "workers": workers, "console": console, "data_dir": data_dir}
    return train(name, recipe, dataset, folder, resume=resume, **given)


def run_seeds(
    recipe: Recipe | str,
    seeds: Sequence[int],
    *,
    name: str | None = None,
    output: str | Path | None = None,
    data_dir: str | Path | None = None,
    resume: bool = False,
    devices: int | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> tuple[Run, ...]:
    """Train a recipe once per seed, as `xnor-jax train --seeds` does.

    The runs are sequential, since one step already uses all cores of a CPU. Each run
    can be resumed, evaluated and packed.

    Args:
      recipe: As for `run`; its own seed is ignored.
      seeds: The seeds, without duplicates.
      name: As for `run`.
      output: The parent of the runs' folders, `seed0`, …. None as for `run`.
      data_dir: As for `run`.
      resume: Whether to resume the runs in the folder; missing runs are started.
      devices: As for `run`.
      workers: As for `run`.
      console: As for `run`; the mean and the spread are printed at the end.

    Returns:
      The runs, in the order of the seeds.

    Raises:
      RecipeError: If the recipe cannot be trained, or seeds are empty or repeated.
      DataError: As for `run`.
      RunError: As for `run`.
    """
    name, recipe = _named(recipe, name)
    each = recipes.with_seeds(recipe, seeds)
    folder = Path(output) if output else folders.default_folder(name, resume=resume)
    recipes.check_machine(recipe, devices, workers)
    mesh = make_mesh(devices, recipe.batch_size)
    load = partial(recipes.load_data, data_dir=data_dir)
    given = {"mesh": mesh, "workers": workers, "console": console, "data_dir": data_dir}
    dataset = load(each[0])
    return train_each(name, each, dataset, folder, load=load, resume=resume, **given)


def load(
    run: Run | str | Path, *, best: bool = False, recipe: Recipe | None = None
) -> nnx.Module:
    """Load the trained model of a run, in evaluation mode.

    Args:
      run: The run, or its folder.
      best: Whether to load the epoch with the highest test accuracy instead of the
        newest.
      recipe: The run's recipe, if it has custom parts that cannot be imported.

    Raises:
      RunError: If there is no such run or checkpoint, it is damaged, or a custom part
        cannot be imported and does not match `recipe`.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    info = folders.read_info(folder, recipe)
    trainer, state, _ = loop.restore(folder, info, best=best)
    return step.trained_model(trainer, state)


def describe_spread(runs: Sequence[Run]) -> str:
    """Describe the runs' test accuracies: mean, sample standard deviation, range."""

    def spread(accuracies: list[float]) -> str:
        mean = statistics.fmean(accuracies)
        most = f"{min(accuracies):.2%} to {max(accuracies):.2%}"
        if len(accuracies) == 1:
            return f"{mean:.2%}"
        return f"{mean:.2%} ± {statistics.stdev(accuracies):.2%} ({most})"

    last = [one.history[-1]["test_accuracy"] for one in runs]
    best = [best_record(one.history)["test_accuracy"] for one in runs]
    return (
        f"{counted(len(runs), 'seed')}, mean ± sample standard deviation "
        "(lowest to highest):\n"
        f"best {spread(best)},\ntest accuracy {spread(last)} in the last epoch"
    )


def train(
    name: str,
    recipe: Recipe,
    dataset: Any,
    folder: Path,
    *,
    resume: bool,
    mesh: Mesh | None,
    workers: int,
    console: Console | None,
    data_dir: str | Path | None,
) -> Run:
    """Train as `run` does, given the name, the data set, the folder and the mesh."""
    console = console or Console(quiet=True)
    info = RunInfo.of(name, recipe, dataset)
    if reason := ship.why_not_packable(info):
        warnings.warn(f"{name} cannot be packed: {reason}", RunWarning, stacklevel=2)
    result = loop.train(
        info,
        dataset,
        folder,
        resume=resume,
        console=console,
        mesh=mesh,
        workers=workers,
        data_dir=data_dir,
    )
    console.print(
        f"done in {result.seconds:.0f} s: {folder}/ holds\n"
        "metrics.jsonl, report.png, tensorboard/ and checkpoints/",
        markup=False,
    )
    last, best = result.history[-1], best_record(result.history)
    console.print(
        f"test accuracy {last['test_accuracy']:.2%} in the last epoch, "
        f"{last['epoch']} (best {best['test_accuracy']:.2%} in epoch {best['epoch']})"
    )
    model = step.trained_model(result.trainer, result.state)
    return Run(folder, result.history, model)


def train_each(
    name: str,
    each: Sequence[Recipe],
    dataset: Any,
    folder: Path,
    *,
    load: Callable[[Recipe], Any],
    resume: bool,
    console: Console | None,
    **given: Any,
) -> tuple[Run, ...]:
    """Call `train` for each of the recipes, which differ in their seeds.

    Args:
      name: The runs' name.
      each: The recipes.
      dataset: The first recipe's data set.
      folder: The parent of the runs' folders.
      load: Reads a recipe's data set, if its split depends on the seed.
      resume: Whether to resume the runs in the folder.
      console: The console to print to; None prints nothing.
      **given: As for `train`.
    """
    if (folder / "recipe.json").exists():
        raise RunError(
            f"{folder} holds a single run; give another folder for several seeds"
        )
    if resume and not any(folder.glob("seed*")):
        raise RunError(f"no runs in {folder} to resume; omit --resume to start them")
    if processes.is_first():
        folders.write_seeds(folder, [recipe.seed for recipe in each])
    runs = []
    for recipe in each:
        at = folder / f"seed{recipe.seed}"
        if recipe.holdout and recipe is not each[0]:
            dataset = load(recipe)
        started = resume and (at / "recipe.json").exists()
        given |= {"resume": started, "console": console}
        runs.append(train(name, recipe, dataset, at, **given))
    if console is not None:
        console.print(describe_spread(runs))
    return tuple(runs)


def _named(recipe: Recipe | str, name: str | None) -> tuple[str, Recipe]:
    found = recipes.get(recipe) if isinstance(recipe, str) else recipe
    if not isinstance(found, Recipe):
        raise TypeError(
            f"expected a Recipe, a preset's name or MODULE:NAME, got {recipe!r}"
        )
    recipes.validate(found)
    if name is None and isinstance(recipe, str):
        name = recipe
    if name is None:
        fields = recipes.to_json(found)
        name = "-".join(
            fields[part].rpartition(":")[2] for part in ("dataset", "model")
        )
    return name, found
