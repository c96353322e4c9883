"""`xnor-jax …`: parses, calls, prints.

Exit status: 0 when the work is done, 2 for a wrong argument, 1 otherwise. An error is
one line on standard error.
"""

import contextlib
import dataclasses
import gc
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from xnor_jax.train import processes
from xnor_jax.train import recipe as recipes
from xnor_jax.train.processes import Cluster
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
    devices: int | None = None
    """How many of JAX's devices share each batch; without it one, and in several
    processes all of theirs."""
    workers: int = 0
    """Processes that prepare the pictures of imagenet and folder; 0 for threads."""
    processes: tyro.conf.OmitArgPrefixes[Cluster] = Cluster()
    """One run in several processes."""


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
    warnings.showwarning = lambda message, *_: _note(message)
    status, interrupted = 0, False
    try:
        _dispatch(arguments)
    except (_UsageError, RecipeError) as error:
        status = _fail(error, 2)
    except KeyboardInterrupt:
        interrupted = True
        mend = "; go on with --resume" if arguments[:1] == ["train"] else ""
        status = _fail(f"interrupted{mend}", 1)
    except BrokenPipeError:
        # The reader of the output has gone; so has the place to say anything.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        from xnor_jax.data import DataError
        from xnor_jax.deploy import FormatError
        from xnor_jax.train.folder import RunError

        if not isinstance(error, DataError | FormatError | RunError | OSError):
            raise
        status = _fail(error, 1)
    if interrupted:
        # A plain exit would wait for the epoch that XLA still computes; what workers
        # shared with this process is given back before.
        gc.collect()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _train(args: list[str]) -> None:
    name, recipe, options = _parse_recipe("train", args, RunOptions())
    from xnor_jax.train import supervisor

    _check_data_dir(options.data_dir)
    try:
        cluster = processes.validate(options.processes)
        if cluster.named and not supervisor.is_worker():
            sys.exit(supervisor.supervise(["train", *args], cluster))
        if cluster.named:
            supervisor.be_worker()
        with processes.joined(cluster):
            _train_here(name, recipe, options)
    except processes.OptionError as error:
        raise _UsageError(error) from error


def _train_here(name: str, recipe: Recipe, options: RunOptions) -> None:
    from rich.console import Console

    from xnor_jax import data
    from xnor_jax.train import folder as folders
    from xnor_jax.train import loop
    from xnor_jax.train.devices import make_mesh

    if recipe.dataset == "folder" and options.data_dir is None:
        raise _UsageError(
            "--data-dir: expected a folder of class folders, train/CLASS/* and "
            "validation/CLASS/*"
        )
    if options.workers < 0:
        raise _UsageError(
            f"--workers: expected a number of at least 0, got {options.workers}"
        )
    base = Path("runs") / name
    choose = folders.newest_folder if options.resume else folders.free_folder
    folder = options.output or choose(base)
    if options.resume:
        _check_run(folder, "to resume; leave --resume out to start one")
    try:
        mesh = make_mesh(options.devices, recipe.batch_size)
    except ValueError as error:
        raise _UsageError(error) from error
    dataset = data.load(recipe.dataset, options.data_dir, recipe.fit)
    info = folders.RunInfo.of(name, recipe, dataset)
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


def _evaluate(args: list[str]) -> None:
    def parse(
        run: tyro.conf.Positional[Path],
        /,
        data_dir: Path | None = None,
        best: bool = False,
    ) -> tuple[Path, Path | None, bool]:
        """Evaluate a run's checkpoint, or a packed network, on its test split.

        Args:
          run: The run's folder, or a file that pack wrote.
          data_dir: The data set's folder; without it the hub is asked.
          best: Of a run, the best epoch's checkpoint; the newest without it.
        """
        return run, data_dir, best

    run, data_dir, best = _parse("evaluate", parse, args)
    _check_data_dir(data_dir)
    if not run.is_file():
        _check_run(run, "and no packed network of that name")
        _evaluate_run(run, data_dir, best=best)
    elif best:
        raise _UsageError(
            f"--best: chooses a checkpoint in a run's folder; {run} is a packed network"
        )
    else:
        _evaluate_packed(run, data_dir)


def _evaluate_run(run: Path, data_dir: Path | None, *, best: bool) -> None:
    from xnor_jax import data
    from xnor_jax.train import feeds, loop
    from xnor_jax.train import folder as folders

    info = folders.read_info(run)
    dataset = data.load(info.recipe.dataset, data_dir, info.recipe.fit)
    trainer, state, history = loop.restore(run, info, best=best)
    if dataset.image_shape != info.image_shape:
        raise folders.RunError(
            f"{run} was trained on images of shape {info.image_shape}, the test images "
            f"have {dataset.image_shape}; give its own data set with --data-dir"
        )
    metrics, count = feeds.evaluate(trainer, state, dataset)
    print(
        f"{info.name}, epoch {history[-1]['epoch']}: {count:,} test images, loss "
        f"{float(metrics.loss):.4f}, test accuracy {float(metrics.accuracy):.2%}"
    )


def _evaluate_packed(file: Path, data_dir: Path | None) -> None:
    from xnor_jax import data
    from xnor_jax.deploy import predict

    packed = _load(file)
    name, fit = predict.dataset_name(packed.info), predict.fit(packed)
    dataset = data.load(name, data_dir, fit)
    metrics = predict.evaluate(packed, dataset)
    print(
        f"{packed.info.name or file}, packed: {dataset.test_images:,} test "
        f"images, loss {metrics.loss:.4f}, test accuracy {metrics.accuracy:.2%}"
    )


def _pack(args: list[str]) -> None:
    def parse(
        run: tyro.conf.Positional[Path],
        /,
        output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
        best: bool = False,
        data_dir: Path | None = None,
    ) -> tuple[Path, Path, bool, Path | None]:
        """Pack a run's checkpoint into a file, at one bit a binary weight.

        Args:
          run: The run's folder.
          output: The file to write; one that is there is replaced.
          best: The best epoch's checkpoint; the newest without it.
          data_dir: The data set's folder, to measure the test accuracy that the file
            tells on its test split; without it the run's own figure is taken.
        """
        return run, output, best, data_dir

    run, output, best, data_dir = _parse("pack", parse, args)
    _check_run(run, "to pack; expected a folder that xnor-jax train wrote")
    _check_data_dir(data_dir)
    if output.is_dir() or not output.parent.is_dir():
        raise _UsageError(
            f"--output: expected a file in a folder that exists, got {output}"
        )
    _check_backend()
    from xnor_jax import deploy
    from xnor_jax.deploy import tables
    from xnor_jax.train import ship

    packed = ship.pack_run(run, best=best, data_dir=data_dir)
    try:
        deploy.save(output, packed)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    size, before = output.stat().st_size, packed.report.bytes_before
    console = _table_console()
    console.print(tables.report_table(f"{packed.info.name}: {run}", packed.report))
    console.print(
        f"{output}: {size:,} bytes with its header, 1/{before / size:.1f} of the "
        f"{before:,} in float32; test accuracy {packed.info.test_accuracy:.2%}"
    )


def _predict(args: list[str]) -> None:
    def parse(
        file: tyro.conf.Positional[Path],
        images: tyro.conf.Positional[tuple[Path, ...]],
        /,
        invert: bool = False,
    ) -> tuple[Path, tuple[Path, ...], bool]:
        """Print the class of images, and its probability.

        Args:
          file: A file that pack wrote.
          images: PNG, JPEG, BMP, GIF, TIFF, WEBP or PPM; turned to grey or colour and
            resized as the network wants.
          invert: Swap dark and light first: MNIST's digits are white on black.
        """
        return file, images, invert

    file, paths, invert = _parse("predict", parse, args)
    if not paths:
        raise _UsageError("no image; expected predict FILE IMAGE…")
    for path in (file, *paths):
        _check_file(path)
    from xnor_jax.deploy import images, predict

    packed = _load(file)
    fit = predict.fit(packed)
    pictures = images.read(paths, packed.image_shape, fit=fit, invert=invert)
    for note in pictures.notes:
        _note(note)
    found = predict.classify(packed, pictures.pixels)
    for path, (name, probability) in zip(paths, found, strict=True):
        print(f"{path}: {name} {probability:.2%}")


def _bench(args: list[str]) -> None:
    def parse(
        file: tyro.conf.Positional[Path],
        /,
        batch_sizes: tuple[int, ...] = (1, 128),
        rounds: int = 10,
        backend: Literal["auto", "float", "xla", "gpu", "pallas", "cpu"] = "auto",
    ) -> tuple[Path, tuple[int, ...], int, str]:
        """Time a packed network on the CPU, beside the same network in floats.

        Args:
          file: A file that pack wrote.
          batch_sizes: Images a call.
          rounds: How often each of the two has its turn.
          backend: What multiplies signs; auto takes cpu where it was built, else xla.
        """
        return file, batch_sizes, rounds, backend

    file, batch_sizes, rounds, backend = _parse("bench", parse, args)
    if not batch_sizes or min(batch_sizes) < 1:
        raise _UsageError("--batch-sizes: expected numbers of at least 1")
    if rounds < 1:
        raise _UsageError(f"--rounds: expected a number of at least 1, got {rounds}")
    _check_file(file)
    packed = _load(file, backend)
    import jax

    from xnor_jax.deploy import bench, tables

    console = _table_console()
    console.print(
        f"{packed.info.name or file}: packed ({bench.describe_backend(backend)}) "
        "beside the same network in float32 by XLA\n"
        f"{bench.describe_cpu()}; jax {jax.__version__}; {rounds} rounds in turn, "
        "median (least–most)"
    )
    results = [
        result
        for threads in bench.thread_numbers()
        for result in bench.measure(
            file, threads, batch_sizes=batch_sizes, rounds=rounds, backend=backend
        )
    ]
    console.print(tables.bench_table(results))


def _summary(args: list[str]) -> None:
    name, recipe, _ = _parse_recipe("summary", args, None)
    from rich.console import Console

    from xnor_jax.train import summary

    Console(soft_wrap=True).print(summary.table(name, recipe))


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "train": (_train, "train a recipe to its end"),
    "evaluate": (_evaluate, "a run's or a packed file's accuracy on its test split"),
    "summary": (_summary, "a recipe's layers, and which kernels are binary"),
    "pack": (_pack, "a run's network into a file, one bit a binary weight"),
    "predict": (_predict, "the classes of image files, by a packed file"),
    "bench": (_bench, "how fast a packed file runs, beside floats"),
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


def _check_run(folder: Path, more: str) -> None:
    if not folder.exists():
        raise _UsageError(f"no run in {folder} {more}")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise _UsageError(f"no file {path}")


def _check_backend(backend: str = "auto") -> None:
    from xnor_jax.ops import backends

    try:
        backends.resolve("xnor-jax", backend)
    except RuntimeError as error:
        raise _UsageError(str(error).removeprefix("xnor-jax: ")) from error


def _load(file: Path, backend: str = "auto") -> Any:
    _check_backend(backend)
    from xnor_jax import deploy

    return deploy.load(file, backend=backend)


def _table_console() -> Any:
    from rich.console import Console

    # A file or a pipe has no width; a table there is not cut.
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, highlight=False, soft_wrap=True)


def _test_accuracy(record: dict[str, Any]) -> float:
    return record["test_accuracy"]


def _note(words: object) -> None:
    print(f"xnor-jax: note: {' '.join(str(words).split())}", file=sys.stderr)


def _fail(error: object, status: int) -> int:
    print(f"xnor-jax: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
