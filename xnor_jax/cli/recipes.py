"""The commands on recipes: train and summary."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from xnor_jax.cli import UsageError, hear_interrupts
from xnor_jax.cli.parsing import check_data, check_data_dir, parse
from xnor_jax.train import recipe as recipes
from xnor_jax.train.cluster import Cluster, OptionError, validate
from xnor_jax.train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where a run reads and writes; none of these changes its numbers."""

    data_dir: Path | None = None
    """The data set's folder, in the hub's layout; without it the hub is asked."""
    output: Path | None = None
    """The run's folder; without it runs/RECIPE, or the next free runs/RECIPE-2, ….
    With --resume: the newest of these."""
    resume: bool = False
    """Go on with the run in the folder."""
    devices: int | None = None
    """How many of JAX's devices share each batch; without it one, and in several
    processes all of theirs."""
    workers: int = 0
    """Processes that prepare the pictures of imagenet and folder; 0 for threads."""
    seeds: tuple[int, ...] = ()
    """Train once with each of these, in the folders seed0, … of the run's folder, and
    print the mean and the spread; --resume goes on with all of them."""
    processes: tyro.conf.OmitArgPrefixes[Cluster] = Cluster()
    """One run in several processes."""


_DEFAULT = "digits-lenet5"
_RecipeName = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(
        metavar="[RECIPE]", help=f"MODULE:NAME, or one of {', '.join(recipes.PRESETS)}."
    ),
]


def train(args: list[str]) -> None:
    """Train a recipe to its end."""

    def arguments(defaults: Recipe) -> Callable[..., Any]:
        def with_defaults(
            recipe: _RecipeName = _DEFAULT,
            /,
            *,
            run: tyro.conf.OmitArgPrefixes[RunOptions] = RunOptions(),
            fields: tyro.conf.OmitArgPrefixes[Recipe] = defaults,
        ) -> tuple[str, Recipe, RunOptions]:
            return recipe, fields, run

        return with_defaults

    name, recipe, options = _parse("train", arguments, args)
    from xnor_jax.train import processes, supervisor

    if "--seeds" in args and not options.seeds:
        raise UsageError("--seeds: expected a value")
    check_data_dir(options.data_dir)
    try:
        cluster = validate(options.processes)
        if cluster.named and not supervisor.is_worker():
            hear_interrupts()
            sys.exit(supervisor.supervise(["train", *args], cluster))
        worker = supervisor.worker if cluster.named else contextlib.nullcontext
        with worker(), processes.joined(cluster):
            _train_here(name, recipe, options)
    except OptionError as error:
        raise UsageError(error) from error


def _train_here(name: str, recipe: Recipe, options: RunOptions) -> None:
    from rich.console import Console

    from xnor_jax import data
    from xnor_jax.train import api, processes
    from xnor_jax.train.devices import make_mesh

    check_data(recipe.dataset, options.data_dir)
    api.check_workers(recipe, options.workers)
    folder = options.output or api.default_folder(name, resume=options.resume)
    if options.resume and not (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(
            f"no run in {folder} to resume; leave --resume out to start one"
        )
    each = api.with_seeds(recipe, options.seeds) if options.seeds else ()
    mesh = make_mesh(options.devices, recipe.batch_size)
    dataset = data.load(recipe.dataset, options.data_dir, recipe.fit)
    hear_interrupts()
    given: dict[str, Any] = {
        "resume": options.resume,
        "mesh": mesh,
        "workers": options.workers,
        "console": Console(
            highlight=False, soft_wrap=True, quiet=not processes.is_first()
        ),
    }
    if each:
        api.train_each(name, each, dataset, folder, **given)
    else:
        api.train(name, recipe, dataset, folder, **given)


def summary(args: list[str]) -> None:
    """Print a recipe's layers."""

    def arguments(defaults: Recipe) -> Callable[..., Any]:
        def with_defaults(
            recipe: _RecipeName = _DEFAULT,
            /,
            *,
            fields: tyro.conf.OmitArgPrefixes[Recipe] = defaults,
        ) -> tuple[str, Recipe]:
            return recipe, fields

        return with_defaults

    name, recipe = _parse("summary", arguments, args)
    from rich.console import Console

    from xnor_jax.train import summary

    Console(soft_wrap=True).print(summary.table(name, recipe))


def _parse(
    command: str, arguments: Callable[[Recipe], Callable[..., Any]], args: list[str]
) -> tuple[Any, ...]:
    """Parse twice: first to learn the recipe, then with its fields as defaults."""
    without_help = [word for word in args if word not in ("-h", "--help")]
    name = parse(command, arguments(recipes.get(_DEFAULT)), without_help)[0]
    base = recipes.get(name)
    name, recipe, *rest = parse(command, arguments(base), args)
    return name, recipes.from_json(recipes.to_json(recipe), base), *rest
