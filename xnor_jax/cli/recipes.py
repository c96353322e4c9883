"""The commands for recipes: train and summary."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from xnor_jax.cli import UsageError, enable_interrupts, groups
from xnor_jax.cli.output import make_console
from xnor_jax.cli.parsing import check_data, check_data_dir, check_run, parse
from xnor_jax.train import folder as folders
from xnor_jax.train import recipe as recipes
from xnor_jax.train.cluster import Cluster, OptionError, validate
from xnor_jax.train.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run that are not part of its recipe."""

    data_dir: Path | None = None
    """The data set's folder, in the hub's layout or of class folders; without it, the
    set is loaded from the hub. The digits and functions take none; folder needs one.
    With --resume, without it, the folder that the run began with."""
    output: Path | None = None
    """The run's folder; without it, runs/RECIPE, or the next free one of runs/RECIPE-2,
    …. With --resume, the newest of these."""
    resume: bool = False
    """Continue the run in the folder, with the options that it began with. More
    --epochs extend it, unless the schedule, the surrogate or the weight method depends
    on their number."""
    seeds: tuple[int, ...] = ()
    """Train once per seed, in the folders seed0, … of the run's folder, and print the
    mean and the spread."""
    devices: int | None = None
    """The number of JAX devices that share each batch; without it, one, or in several
    processes all of their devices."""
    workers: int = 0
    """The number of processes that prepare the pictures of imagenet and folder; 0 for
    threads."""


_DEFAULT = "digits-lenet5"
_RecipeName = Annotated[
    tyro.conf.Positional[str | None],
    tyro.conf.arg(
        metavar="[RECIPE]",
        help=f"MODULE:NAME, or one of {', '.join(recipes.PRESETS)}.",
        help_behavior_hint=f"(default: {_DEFAULT})",
    ),
]

# The option groups in help order, those that most runs need first.
_group = partial(groups.group, choices=recipes.PARTS)
_MAIN = _group(
    "Main",
    "The options that most runs need.",
    [
        *((RunOptions, name) for name in ("data_dir", "output", "resume", "seeds")),
        *((Recipe, name) for name in ("seed", "epochs", "batch_size")),
        *((Recipe, name) for name in ("learning_rate", "binary")),
    ],
)
_NETWORK = _group(
    "Network",
    "The network.",
    [
        (Recipe, name)
        for name in (
            *("model", "rule", "surrogate", "multiplier", "precision"),
            *("weight_method", "input_scale", "compute_dtype", "scale_minimum"),
            *("calibration_batches", "initial"),
        )
    ],
)
_TRAINING = _group(
    "Training",
    "The optimizer and its schedule.",
    [
        (Recipe, name)
        for name in (
            *("optimizer", "schedule", "warmup_epochs", "decay_epochs"),
            *("decay_factor", "weight_decay", "decay"),
            *("label_smoothing", "teacher"),
        )
    ],
)
_IMAGES = _group(
    "Images",
    "The data set and its augmentation.",
    [
        (Recipe, name)
        for name in (
            *("dataset", "validation_share", "image_size"),
            *("shift", "flip", "mixup", "resize_crop"),
        )
    ],
)
_RECIPE = _group(
    "Recipe",
    "The settings that determine the result of a run.",
    [(Recipe, field.name) for field in dataclasses.fields(Recipe)],
)
_MACHINE = _group(
    "Machine",
    "Devices and workers; results change only by rounding.",
    [(RunOptions, name) for name in ("devices", "workers")],
)
_HOSTS = _group(
    "SeveralHosts",
    "One run in several processes: start the same command once on each host.",
    [(Cluster, field.name) for field in dataclasses.fields(Cluster)],
)
_ALL = (_MAIN, _NETWORK, _TRAINING, _IMAGES, _MACHINE, _HOSTS)


class _Train(NamedTuple):
    """The parsed arguments of `train`."""

    name: str | None
    recipe: Recipe
    options: RunOptions
    cluster: Cluster


def train(args: list[str]) -> None:
    """Train a recipe to its end."""
    words = [word for word in args if word not in ("-h", "--help")]
    typed = _parse_train(recipes.get(_DEFAULT), words)
    if "--seeds" in args and not typed.options.seeds:
        raise UsageError("--seeds: expected a value")
    one_seed = any(word.partition("=")[0] == "--seed" for word in args)
    if typed.options.seeds and one_seed:
        raise UsageError("--seed: expected none with --seeds")
    check_data_dir(typed.options.data_dir)
    name = _DEFAULT if typed.name is None else typed.name
    base, seeds = None, typed.options.seeds
    output = typed.options.output
    if typed.options.resume:
        output = output or folders.default_folder(name, resume=True)
        if not (output.is_dir() and any(output.iterdir())):
            raise UsageError(
                f"no run in {output} to resume; omit --resume to start one"
            )
        if started := folders.read_started(output):
            name, base, known = started
            seeds = seeds or known
            if known and one_seed:
                raise UsageError(f"--seed: expected none; {output} has several seeds")
            if typed.name not in (None, name):
                raise UsageError(
                    f"{output} holds a run of {name}, not of {typed.name}; leave the "
                    "recipe out, or give another folder with --output"
                )
    base = base or recipes.get(name)
    _, recipe, options, cluster = _parse_train(base, args)
    recipe = recipes.from_json(recipes.to_json(recipe), base)
    data_dir = options.data_dir
    if output and typed.options.resume and data_dir is None:
        data_dir = folders.read_data_dir(output)
        check_data_dir(data_dir)
    changed = {"output": output, "seeds": seeds, "data_dir": data_dir}
    options = dataclasses.replace(options, **changed)
    check_data(recipe.dataset, options.data_dir)
    recipes.check_machine(recipe, options.devices, options.workers)
    each = recipes.with_seeds(recipe, seeds) if seeds else ()
    for option in () if options.resume else ("teacher", "initial"):
        if (run := getattr(recipe, option)) is not None:
            check_run(Path(run), option=option)
    try:
        cluster = validate(cluster)
        from xnor_jax.train import processes, supervisor

        if cluster.named and not supervisor.is_worker():
            enable_interrupts()
            sys.exit(supervisor.supervise(["train", *args], cluster))
        worker = supervisor.worker if cluster.named else contextlib.nullcontext
        with worker(), processes.joined(cluster):
            _train_here(name, recipe, each, options)
    except OptionError as error:
        raise UsageError(error) from error


def _parse_train(defaults: Recipe, args: list[str]) -> _Train:
    values = [groups.fill(group, vars(defaults)) for group in _ALL]

    # Type checkers reject types that are made at run time.
    def arguments(
        recipe: _RecipeName = None,
        /,
        *,
        main: tyro.conf.OmitArgPrefixes[_MAIN] = values[0],  # type: ignore
        network: tyro.conf.OmitArgPrefixes[_NETWORK] = values[1],  # type: ignore
        training: tyro.conf.OmitArgPrefixes[_TRAINING] = values[2],  # type: ignore
        images: tyro.conf.OmitArgPrefixes[_IMAGES] = values[3],  # type: ignore
        machine: tyro.conf.OmitArgPrefixes[_MACHINE] = values[4],  # type: ignore
        several_hosts: tyro.conf.OmitArgPrefixes[_HOSTS] = values[5],  # type: ignore
    ) -> _Train:
        """Train a recipe to its end, in a folder with its checkpoints and report."""
        parsed = (main, network, training, images, machine, several_hosts)
        classes = (Recipe, RunOptions, Cluster)
        return _Train(recipe, *(groups.gather(parsed, cls) for cls in classes))

    return parse("train", arguments, args)


def _train_here(
    name: str, recipe: Recipe, each: Sequence[Recipe], options: RunOptions
) -> None:
    from xnor_jax.train import api, processes
    from xnor_jax.train.devices import make_mesh

    folder = options.output or folders.default_folder(name, resume=False)
    mesh = make_mesh(options.devices, recipe.batch_size)
    load = partial(recipes.load_data, data_dir=options.data_dir)
    dataset = load(each[0] if each else recipe)
    enable_interrupts()
    given: dict[str, Any] = {
        "resume": options.resume,
        "mesh": mesh,
        "workers": options.workers,
        "data_dir": options.data_dir,
        "console": make_console(quiet=not processes.is_first()),
    }
    if each:
        api.train_each(name, each, dataset, folder, load=load, **given)
    else:
        api.train(name, recipe, dataset, folder, **given)


def summary(args: list[str]) -> None:
    """Print a recipe's layers."""

    def arguments(defaults: Recipe) -> Callable[..., tuple[str | None, Recipe]]:
        values = groups.fill(_RECIPE, vars(defaults))

        def with_defaults(
            name: _RecipeName = None,
            /,
            *,
            recipe: tyro.conf.OmitArgPrefixes[_RECIPE] = values,  # type: ignore
        ) -> tuple[str | None, Recipe]:
            """Print a recipe's layers, and which kernels are binary."""
            return name, groups.gather([recipe], Recipe)

        return with_defaults

    words = [word for word in args if word not in ("-h", "--help")]
    name = parse("summary", arguments(recipes.get(_DEFAULT)), words)[0]
    name = _DEFAULT if name is None else name
    base = recipes.get(name)
    recipe = parse("summary", arguments(base), args)[1]
    recipe = recipes.from_json(recipes.to_json(recipe), base)
    from xnor_jax.train import summary

    table = summary.table(name, recipe)
    make_console().print(table)
