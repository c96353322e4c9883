"""The commands on recipes: train and summary."""

import dataclasses
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from xnor_jax.cli import UsageError, as_typed, hear_interrupts
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
    processes: tyro.conf.OmitArgPrefixes[Cluster] = Cluster()
    """One run in several processes."""


_DEFAULT = "digits-lenet5"
_RecipeName = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="[RECIPE]", help=f"One of {', '.join(recipes.PRESETS)}."),
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

    # What a batch system or a container sends to end a run is heard as Ctrl-C is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    name, recipe, options = _parse("train", arguments, args)
    from xnor_jax.train import processes, supervisor

    check_data_dir(options.data_dir)
    try:
        cluster = validate(options.processes)
        if cluster.named and not supervisor.is_worker():
            hear_interrupts()
            sys.exit(supervisor.supervise(["train", *args], cluster))
        if cluster.named:
            supervisor.be_worker()
        with processes.joined(cluster):
            _train_here(name, recipe, options)
    except OptionError as error:
        raise UsageError(error) from error


def _train_here(name: str, recipe: Recipe, options: RunOptions) -> None:
    from rich.console import Console

    from xnor_jax import data
    from xnor_jax.train import folder as folders
    from xnor_jax.train import loop, processes
    from xnor_jax.train.devices import make_mesh

    check_data(recipe.dataset, options.data_dir)
    if options.workers < 0:
        raise UsageError(
            f"--workers: expected a number of at least 0, got {options.workers}"
        )
    if options.workers and recipe.image_size is None:
        raise UsageError(
            f"--workers: expected 0 for {recipe.dataset}, whose images are in memory, "
            f"got {options.workers}"
        )
    base = Path("runs") / name
    choose = folders.newest_folder if options.resume else folders.free_folder
    folder = options.output or choose(base)
    if options.resume and not folder.exists():
        raise UsageError(
            f"no run in {folder} to resume; leave --resume out to start one"
        )
    try:
        mesh = make_mesh(options.devices, recipe.batch_size)
    except ValueError as error:
        raise UsageError(as_typed(str(error))) from error
    dataset = data.load(recipe.dataset, options.data_dir, recipe.fit)
    info = folders.RunInfo.of(name, recipe, dataset)
    hear_interrupts()
    console = Console(highlight=False, soft_wrap=True, quiet=not processes.is_first())
    console.print(
        f"{name}: {info.train_images:,} training images, {recipe.epochs} epochs of "
        f"{info.steps_per_epoch} steps, seed {recipe.seed}, in {folder}"
    )
    result = loop.train(
        info,
        dataset,
        folder,
        resume=options.resume,
        console=console,
        mesh=mesh,
        workers=options.workers,
    )
    # Of equal ones the last, which is the checkpoint that is kept.
    last, best = result.history[-1], max(reversed(result.history), key=_test_accuracy)
    console.print(
        f"done in {result.seconds:.0f} s: {folder}/ holds metrics.jsonl, report.png, "
        "tensorboard/ and checkpoints/"
    )
    console.print(
        f"test accuracy {_test_accuracy(last):.2%} in the last epoch, {last['epoch']} "
        f"(best {_test_accuracy(best):.2%} in epoch {best['epoch']})"
    )


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
    name, recipe, *rest = parse(command, arguments(recipes.get(name)), args)
    return name, recipes.validate(recipe), *rest


def _test_accuracy(record: dict[str, Any]) -> float:
    return record["test_accuracy"]
