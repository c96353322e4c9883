"""`xnor-jax …`: parses, calls, prints.

Exit status: 0 when the work is done, 2 for a wrong argument, 1 otherwise. An error is
one line on standard error.
"""

import contextlib
import dataclasses
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from xnor_jax.train import recipe as recipes
from xnor_jax.train.recipe import Recipe, RecipeError


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


_RecipeName = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="[RECIPE]", help=f"One of {', '.join(recipes.PRESETS)}."),
]


class _UsageError(Exception):
    """A wrong argument."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if args is None else args)
    # When a file cannot be written, TensorStore's threads and tasks print a traceback
    # each through these two; the error itself is raised, and told below in a line.
    sys.unraisablehook = lambda *_: None
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    status, interrupted = 0, False
    try:
        _dispatch(arguments)
    except (_UsageError, RecipeError) as error:
        status = _fail(error, 2)
    except KeyboardInterrupt:
        interrupted = True
        status = _fail("interrupted; go on with --resume", 1)
    except BrokenPipeError:
        # The reader of the output has gone; so has the place to say anything.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        from xnor_jax.data import DataError
        from xnor_jax.train.folder import RunError

        if not isinstance(error, DataError | RunError | OSError):
            raise
        status = _fail(error, 1)
    if interrupted:
        # A plain exit would wait for the epoch that XLA still computes.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _train(args: list[str]) -> None:
    name, recipe, options = _parse_recipe("train", args, RunOptions())
    from rich.console import Console

    from xnor_jax import data
    from xnor_jax.train import folder as folders
    from xnor_jax.train import loop

    _check_data_dir(options.data_dir)
    base = Path("runs") / name
    choose = folders.newest_folder if options.resume else folders.free_folder
    folder = options.output or choose(base)
    dataset = data.load(recipe.dataset, options.data_dir)
    info = folders.RunInfo.of(name, recipe, dataset)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{name}: {info.train_images:,} training images, {recipe.epochs} epochs of "
        f"{info.steps_per_epoch} steps, seed {recipe.seed}, in {folder}"
    )
    result = loop.train(info, dataset, folder, resume=options.resume, console=console)
    last, best = result.history[-1], max(result.history, key=_test_accuracy)
    console.print(
        f"done in {result.seconds:.0f} s: {folder}/ holds metrics.jsonl, report.png, "
        "tensorboard/ and checkpoints/"
    )
    console.print(
        f"test accuracy {_test_accuracy(last):.2%} in the last epoch, {last['epoch']} "
        f"(best {_test_accuracy(best):.2%} in epoch {best['epoch']})"
    )


def _evaluate(args: list[str]) -> None:
    def parse(
        run: tyro.conf.Positional[Path],
        /,
        data_dir: Path | None = None,
        best: bool = False,
    ) -> tuple[Path, Path | None, bool]:
        """Evaluate a run's checkpoint on its test split.

        Args:
          run: The run's folder.
          data_dir: The data set's folder; without it the hub is asked.
          best: The best epoch's checkpoint; the newest without it.
        """
        return run, data_dir, best

    run, data_dir, best = _parse("evaluate", parse, args)
    _check_data_dir(data_dir)
    import jax.numpy as jnp

    from xnor_jax import data
    from xnor_jax.train import folder as folders
    from xnor_jax.train import loop, step

    info = folders.read_info(run)
    dataset = data.load(info.recipe.dataset, data_dir)
    trainer, state, history = loop.restore(run, info, best=best)
    images, labels = map(jnp.asarray, dataset.test)
    if images.shape[1:] != info.image_shape:
        raise folders.RunError(
            f"{run} was trained on images of shape {info.image_shape}, the test images "
            f"have {images.shape[1:]}; give its own data set with --data-dir"
        )
    metrics = step.make_evaluate(trainer)(state.params, state.rest, images, labels)
    print(
        f"{info.name}, epoch {history[-1]['epoch']}: {len(labels):,} test images, loss "
        f"{float(metrics.loss):.4f}, test accuracy {float(metrics.accuracy):.2%}"
    )


def _summary(args: list[str]) -> None:
    name, recipe, _ = _parse_recipe("summary", args, None)
    from rich.console import Console

    from xnor_jax.train import summary

    Console(soft_wrap=True).print(summary.table(name, recipe))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (_train, "train a recipe to its end"),
    "evaluate": (_evaluate, "a run's accuracy on its test split"),
    "summary": (_summary, "a recipe's layers, and which kernels are binary"),
}


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("usage: xnor-jax COMMAND …\n")
        for name, (_, help_text) in COMMANDS.items():
            print(f"  {name:<10} {help_text}")
        print(f"\nrecipes: {', '.join(recipes.PRESETS)}")
        print("xnor-jax COMMAND --help says more.")
        if not args:
            raise _UsageError(f"no command; expected one of {', '.join(COMMANDS)}")
        return
    if args[0] == "--version":
        from xnor_jax import __version__

        print(f"xnor-jax {__version__}")
        return
    if args[0] not in COMMANDS:
        raise _UsageError(
            f"unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}"
        )
    COMMANDS[args[0]][0](args[1:])


def _parse_recipe(
    command: str, args: list[str], options: Any
) -> tuple[str, Recipe, Any]:
    """Parse twice: first to learn the recipe, then with its fields as defaults."""

    def parse(args: list[str], defaults: Recipe) -> tuple[str, Recipe, Any]:
        def plain(
            recipe: _RecipeName = "digits-lenet5",
            /,
            *,
            fields: tyro.conf.OmitArgPrefixes[Recipe] = defaults,
        ) -> tuple[str, Recipe, None]:
            return recipe, fields, None

        def with_options(
            recipe: _RecipeName = "digits-lenet5",
            /,
            *,
            run: tyro.conf.OmitArgPrefixes[RunOptions] = options,
            fields: tyro.conf.OmitArgPrefixes[Recipe] = defaults,
        ) -> tuple[str, Recipe, RunOptions]:
            return recipe, fields, run

        return _parse(command, plain if options is None else with_options, args)

    without_help = [word for word in args if word not in ("-h", "--help")]
    name = parse(without_help, recipes.get("digits-lenet5"))[0]
    name, recipe, options = parse(args, recipes.get(name))
    return name, recipes.validate(recipe), options


def _parse(command: str, function: Callable[..., Any], args: list[str]) -> Any:
    """Parse with tyro; its boxed complaint becomes one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(function, args=args, prog=f"xnor-jax {command}")
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
        words = re.sub(r"╭.*?╮|[│╰╯─]+", " ", words)
        words = re.sub(r"For full helptext.*", "", " ".join(words.split()))
        raise _UsageError(f"{words.strip()} (see xnor-jax {command} --help)") from None


def _check_data_dir(data_dir: Path | None) -> None:
    if data_dir is not None and not data_dir.is_dir():
        raise _UsageError(
            f"--data-dir: no folder {data_dir}; expected one in the layout of the "
            "Hugging Face hub"
        )


def _test_accuracy(record: dict[str, Any]) -> float:
    return record["test_accuracy"]


def _fail(error: object, status: int) -> int:
    print(f"xnor-jax: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
