"""The commands for runs: evaluate, also for packed files, compare and pack."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from xnor_jax._words import counted
from xnor_jax.cli import UsageError, note
from xnor_jax.cli.output import make_console
from xnor_jax.cli.packed import load
from xnor_jax.cli.parsing import (
    check_backend,
    check_data,
    check_data_dir,
    check_output,
    check_run,
    command,
    find_packed,
)


@command
def evaluate(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    data_dir: Path | None = None,
    best: bool = False,
    report: bool = False,
    validation_share: float = 0.0,
    seed: int = 0,
) -> None:
    """Evaluate a run's checkpoint, or a packed network, on its test split.

    Args:
      run: The run's folder, a file written by pack, or the name of a network in the
        zoo.
      data_dir: The data set's folder; without it, that of the run's training, or else
        the set is loaded from the hub. The digits and functions take none; a packed
        file of class folders needs one.
      best: Evaluate a run's best epoch; without it, the newest.
      report: Print the confusion matrix and draw it in confusion.png in the run's
        folder, or FILE.confusion.png beside the packed file, or in the current folder
        for a network in the zoo. Also draw, in signs.png, the input signs of the first
        binary convolutions for a test image, and their kernels.
      validation_share: For a packed file and class folders without a split: the share
        of each class that the training held out.
      seed: The seed of the training, which selected the held-out pictures.
    """
    check_data_dir(data_dir)
    if not 0 <= validation_share < 1:
        raise UsageError(
            f"--validation-share: expected a number in [0, 1), got {validation_share}"
        )
    if run.is_dir():
        check_run(run, ", or a file that pack wrote")
        if validation_share or seed:
            raise UsageError(
                "--validation-share, --seed: expected none for a run, which has its own"
            )
        _evaluate_run(run, data_dir, best=best, report=report)
        return
    try:
        file = find_packed(run)
    except UsageError as error:
        raise UsageError(f"no run in {run}, {error}") from None
    if best:
        raise UsageError(
            f"--best: expected a run's folder, with checkpoints; {run} is a packed file"
        )
    if seed and not validation_share:
        raise UsageError("--seed: expected --validation-share with it")
    holdout = (validation_share, seed) if validation_share else None
    _evaluate_packed(load(file), run, data_dir, holdout, report=report)


def _evaluate_run(
    run: Path, data_dir: Path | None, *, best: bool, report: bool
) -> None:
    from xnor_jax.train import feeds, loop, predict, ship
    from xnor_jax.train import folder as folders
    from xnor_jax.train import recipe as recipes

    info = folders.read_info(run)
    if data_dir is None:
        data_dir = folders.read_data_dir(run)
        check_data_dir(data_dir)
    check_data(info.recipe.dataset, data_dir)
    dataset = recipes.load_data(info.recipe, data_dir, train=False)
    trainer, state, history = loop.restore(run, info, best=best)
    if dataset.image_shape != info.image_shape:
        raise folders.RunError(
            f"{run} was trained on images of shape {info.image_shape}, but the test "
            f"images have shape {dataset.image_shape}; give the run's own data set "
            "with --data-dir"
        )
    predict.check_classes(info.class_names, dataset)
    metrics, count = feeds.evaluate(trainer, state, dataset)
    print(
        f"{info.name}, epoch {history[-1]['epoch']}: {counted(count, 'test image')}, "
        f"loss {float(metrics.loss):.4f}, test accuracy {float(metrics.accuracy):.2%}"
    )
    if report:
        title = f"{info.name}, epoch {history[-1]['epoch']}"
        packed = None
        if info.recipe.binary:
            try:
                packed = ship.pack_run(run, best=best)
            except folders.RunError as error:
                note(error)
        logits = feeds.logits(trainer, state)
        _report(logits, packed, dataset, title, run / "confusion.png")


def _evaluate_packed(
    packed: Any,
    file: Path,
    data_dir: Path | None,
    holdout: tuple[float, int] | None,
    *,
    report: bool,
) -> None:
    from xnor_jax import data
    from xnor_jax.train import predict

    name, fit = predict.dataset_name(packed.info), predict.fit(packed)
    check_data(name, data_dir)
    if holdout and name != "folder":
        raise UsageError(
            f"--validation-share: expected none for {name}, which has a test split"
        )
    split = holdout and data.Holdout(*holdout)
    dataset = data.load(name, data_dir, fit, split, train=False)
    metrics = predict.evaluate(packed, dataset)
    print(
        f"{packed.info.name or file}, packed: "
        f"{counted(dataset.test_images, 'test image')}, loss {metrics.loss:.4f}, "
        f"test accuracy {metrics.accuracy:.2%}"
    )
    if report:
        title = f"{packed.info.name or file}, packed"
        path = file.with_name(f"{file.name}.confusion.png")
        logits = partial(predict.logits, packed)
        _report(logits, packed, dataset, title, path)


def _report(logits: Any, packed: Any, dataset: Any, title: str, path: Path) -> None:
    from xnor_jax.train import confusion, features, figures

    counts = confusion.matrix(logits, dataset)
    names = dataset.class_names
    print("rows: the true classes; columns: the predicted classes")
    make_console().print(confusion.table(counts, names))
    figures.save(confusion.picture(counts, names, title), path)
    print(f"drawn in {path}")
    if packed is None:
        return
    image = next(dataset.test_splits()).images[0]
    if (signs := features.picture(packed, image, title)) is not None:
        path = path.with_name(path.name.replace("confusion.png", "signs.png"))
        figures.save(signs, path)
        print(f"drawn in {path}")


@command
def compare(
    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN ...", help_behavior_hint="(at least one)"),
    ],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("compare.png"),
) -> None:
    """Print the accuracies of runs side by side, and draw their curves.

    Runs that differ only in their seeds are one row: mean ± sample standard deviation.
    The rows are labelled by the settings that differ.

    Args:
      runs: Folders written by train, of one seed or of several.
      output: The image file to write.
    """
    if not runs:
        raise UsageError("no run; expected compare RUN…")
    if output.is_dir() or not output.parent.is_dir() or output.suffix != ".png":
        raise UsageError(
            f"--output: expected a .png in a folder that exists, got {output}"
        )
    for run in runs:
        if not (run / "seeds.json").is_file():
            check_run(run)
    from xnor_jax.train import compare as comparison
    from xnor_jax.train import figures

    groups = comparison.read(runs)
    make_console().print(comparison.table(groups))
    figures.save(comparison.picture(groups), output)
    print(f"drawn in {output}")


@command
def pack(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    best: bool = False,
    data_dir: Path | None = None,
) -> None:
    """Pack a run's checkpoint into a file, at one bit per binary weight.

    Args:
      run: The run's folder.
      output: The file to write; an existing file is replaced.
      best: Pack the best epoch; without it, the newest.
      data_dir: The data set's folder, to measure the test accuracy that the file
        stores; without it, the file stores the run's own test accuracy.
    """
    check_run(run)
    check_data_dir(data_dir)
    check_output(output)
    check_backend()
    from xnor_jax import packing
    from xnor_jax.packing import tables
    from xnor_jax.train import folder as folders
    from xnor_jax.train import ship

    if data_dir is not None:
        check_data(folders.read_info(run).recipe.dataset, data_dir)
    packed = ship.pack_run(run, best=best, data_dir=data_dir)
    try:
        packing.save(output, packed)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    size, before = output.stat().st_size, packed.report.bytes_before
    console = make_console()
    console.print(tables.report_table(f"{packed.info.name}: {run}", packed.report))
    console.print(
        f"{output}: {size:,} bytes with its header,\n1/{before / size:.1f} of the "
        f"{before:,} in float32; test accuracy {packed.info.test_accuracy:.2%}"
    )
