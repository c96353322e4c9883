"""A run's folder: which run it holds, and its small files, written atomically."""

import dataclasses
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from xnor_jax._words import counted
from xnor_jax.data import SOURCES, ImageSet, Source
from xnor_jax.train import custom
from xnor_jax.train import recipe as recipes
from xnor_jax.train.recipe import Recipe, RecipeError

METRICS = (
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "flip_ratio",
    "images_per_second",
)
# Only in runs on a data set on disk: the share of the training time for which the
# devices waited for a batch.
DATA_WAIT = "data_wait"
SEEDS = "seeds.json"
DATA_DIR = "data_dir.json"
_CHECKSUM = "checksum"  # in recipe.json


class RunError(Exception):
    """A run that cannot be started, continued or read."""


class RunWarning(UserWarning):
    """A run that continues or is read despite a problem."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """The content of `recipe.json`: enough to rebuild the network without the data.

    Attributes:
      name: The run's name, such as a preset's, or MODULE:NAME.
      recipe: The recipe.
      source: The normalisation of pixels.
      image_shape: Height, width, channels.
      class_names: One per class.
      train_images: The number of training images.
      modules: The SHA-256 of the source of each module with custom parts of the recipe,
        when the run began.
      inputs: The CRC-32 of the images and labels of each split and of the teacher's
        parameters, when the run began; of images on disk, of the labels only.
    """

    name: str
    recipe: Recipe
    source: Source
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    train_images: int
    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, name: str, recipe: Recipe, dataset: ImageSet) -> "RunInfo":
        """Describe a run of `recipe` on `dataset`."""
        fields = recipes.to_json(recipe)
        parts = (name, *(str(fields[part]) for part in recipes.PARTS))
        return cls(
            name,
            recipe,
            dataset.source,
            dataset.image_shape,
            dataset.class_names,
            dataset.train_images,
            custom.digests(filter(custom.is_reference, parts)),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `recipe.json`, but for its checksum."""
        data: dict[str, Any] = {
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "train_images": self.train_images,
        }
        if callable(self.recipe.dataset):
            data |= {"mean": list(self.source.mean), "std": list(self.source.std)}
        fields = {"name": self.name, **recipes.to_json(self.recipe), "data": data}
        for key in ("modules", "inputs"):
            if found := getattr(self, key):
                fields[key] = dict(found)
        return fields

    def __repr__(self) -> str:
        # Equal in all processes of a run: a function's own repr contains its address.
        return f"RunInfo({self.to_json()})"

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches in the training images."""
        return self.train_images // self.recipe.batch_size


def open_folder(folder: Path, info: RunInfo, *, resume: bool) -> None:
    """Create the run's folder, or check that the run in it can be resumed.

    Args:
      folder: The run's folder.
      info: The run.
      resume: Whether to resume the run in the folder.

    Raises:
      RunError: If the folder holds something else or cannot be written, or there is no
        run to resume.
    """
    existing = folder / "recipe.json"
    if existing.exists():
        found = read_fields(folder)
        if not resume:
            raise RunError(
                f"{folder} already holds a run of {found['name']}; resume it with "
                "--resume, or give another folder with --output"
            )
        _check_options(folder, found)
        difference = _difference(found, info)
        if difference:
            raise RunError(
                f"{folder} holds another run: {difference}; give the same recipe, or "
                "another folder with --output"
            )
        _warn_of_changes(folder, found["modules"])
        then = found["inputs"]
        changed = [key for key in then if then[key] != info.inputs.get(key)]
        _warn_of(folder, [f"the {key.replace('_', ' ')}" for key in changed])
        if found["epochs"] < info.recipe.epochs:
            fields = json.loads(existing.read_text())
            fields.pop(_CHECKSUM, None)
            _write_fields(existing, fields | {"epochs": info.recipe.epochs})
        return
    try:
        # A run that was killed before the rename leaves only this file.
        leftover = _temporary(existing)
        there = list(folder.iterdir()) if folder.exists() else []
        if resume and not there:
            raise RunError(f"no run in {folder} to resume; omit --resume to start one")
        if there and not resume and (seeds := read_seeds(folder)):
            raise RunError(
                f"{folder} already holds the runs of {counted(len(seeds), 'seed')}; "
                "resume them with --resume, or give another folder with --output"
            )
        if any(path != leftover for path in there):
            raise RunError(
                f"{folder} holds other files and no run; give another folder with "
                "--output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write_fields(existing, info.to_json())
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror or error}; give a writable "
            "folder with --output"
        ) from error


def read_info(folder: Path, recipe: Recipe | None = None) -> RunInfo:
    """Read `recipe.json`.

    Args:
      folder: The run's folder.
      recipe: The recipe that the run was trained with, if its callables cannot be
        imported. None imports them by their names.

    Raises:
      RunError: If the file is missing or damaged, or names something that cannot be
        imported.
    """
    fields = read_fields(folder)
    _check_options(folder, fields)
    name, data, modules, inputs = (
        fields.pop(key) for key in ("name", "data", "modules", "inputs")
    )
    try:
        base = recipe
        if base is None and custom.is_reference(name):
            base = recipes.get(name)
        found = recipes.from_json(fields, base)
    except RecipeError as error:
        raise RunError(f"the recipe of {folder} cannot be restored: {error}") from error
    if isinstance(found.dataset, str):
        source = SOURCES[found.dataset]
    else:
        mean, std, shape = (data[key] for key in ("mean", "std", "image_shape"))
        source = Source(fields["dataset"], mean, std, shape)
    _warn_of_changes(folder, modules)
    shape, names, images = (
        data[key] for key in ("image_shape", "class_names", "train_images")
    )
    return RunInfo(name, found, source, shape, names, images, modules, inputs)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write all of `metrics.jsonl` from a history, one object per epoch."""
    lines = [
        json.dumps({key: epoch[key] for key in (*METRICS, DATA_WAIT) if key in epoch})
        for epoch in history
    ]
    write_atomically(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`, one object per epoch.

    Raises:
      RunError: If the file is missing, empty or damaged.
    """
    path = folder / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in path.read_text().splitlines()]
        for epoch in history:
            if any(type(epoch[key]) not in (int, float) for key in METRICS):
                raise ValueError("expected numbers")
    except FileNotFoundError:
        history = []
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise RunError(
            f"cannot read {path}: {_reason(error)}; --resume rewrites it"
        ) from error
    if not history:
        raise RunError(f"{folder} has no completed epoch yet; train for one first")
    return history


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`; a crash leaves the old file or the new one."""
    temporary = _temporary(path)
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_fields(path: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields | {_CHECKSUM: _checksum(fields)}, indent=2)
    write_atomically(path, text + "\n")


def _checksum(fields: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(fields).encode()):08x}"


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def default_folder(name: str, *, resume: bool) -> Path:
    """Return `runs/NAME` or the next free `runs/NAME-2`, …; to resume, the newest."""
    base = Path("runs") / re.sub(r"[^\w.-]+", "-", name)
    return newest_folder(base) if resume else free_folder(base)


def read_started(folder: Path) -> tuple[str, Recipe, tuple[int, ...]] | None:
    """Read the name, the recipe and the seeds of the run or runs in a folder.

    Returns:
      Name, recipe and seeds, which are empty for a single run; None if there is no run.

    Raises:
      RunError: If the folder's files cannot be read.
    """
    seeds = read_seeds(folder)
    for place in _places(folder, seeds):
        if (place / "recipe.json").exists():
            with warnings.catch_warnings():
                # Resuming the run repeats the warning.
                warnings.simplefilter("ignore", RunWarning)
                info = read_info(place)
            return info.name, info.recipe, seeds
    return None


def read_data_dir(folder: Path) -> Path | None:
    """Read the data set's folder of the run or runs in a folder; None without one.

    Raises:
      RunError: If the file is damaged.
    """
    for place in _places(folder, read_seeds(folder)):
        path = place / DATA_DIR
        try:
            return Path(json.loads(path.read_text()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError, TypeError) as error:
            raise RunError(
                f"cannot read {path}: {_reason(error)}; remove it, and give --data-dir"
            ) from error
    return None


def write_data_dir(folder: Path, data_dir: str | os.PathLike[str]) -> None:
    """Write the data set's folder into a run's, for `read_data_dir`."""
    text = json.dumps(os.path.abspath(data_dir))
    write_atomically(folder / DATA_DIR, text + "\n")


def _places(folder: Path, seeds: Sequence[int]) -> list[Path]:
    return [folder, *(folder / f"seed{seed}" for seed in seeds)]


def read_seeds(folder: Path) -> tuple[int, ...]:
    """Read the seeds of the runs in a folder; empty if it holds a single run.

    Raises:
      RunError: If the list is damaged.
    """
    path = folder / SEEDS
    try:
        seeds = json.loads(path.read_text())
        if not (isinstance(seeds, list) and all(type(seed) is int for seed in seeds)):
            raise ValueError(f"expected a list of whole numbers, got {seeds!r}")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"cannot read {path}: {error}; remove it, and give --seeds"
        ) from error
    return tuple(seeds)


def write_seeds(folder: Path, seeds: Sequence[int]) -> None:
    """Add `seeds` to the list of seeds in the folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    known = dict.fromkeys((*read_seeds(folder), *seeds))
    write_atomically(folder / SEEDS, json.dumps(list(known)) + "\n")


def free_folder(base: Path) -> Path:
    """Return `base`, or the first of `base-2`, `base-3`, … that does not exist yet."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def newest_folder(base: Path) -> Path:
    """Return the last folder that `free_folder(base)` gave; `base` if there is none."""
    folder, number = base, 1
    while (following := base.with_name(f"{base.name}-{number + 1}")).exists():
        folder, number = following, number + 1
    return folder


def read_fields(folder: Path) -> dict[str, Any]:
    """Read the fields of `recipe.json`, without importing the custom parts they name.

    Returns:
      `name`, the recipe's fields as they are written, with defaults for missing ones,
      `data` with tuples, `modules` and `inputs`. Options of other versions are kept.

    Raises:
      RunError: If the file is missing or damaged.
    """
    path = folder / "recipe.json"
    try:
        fields = json.loads(path.read_text())
        # Runs of earlier versions have none.
        if _CHECKSUM in fields and fields.pop(_CHECKSUM) != _checksum(fields):
            raise ValueError(
                f"it was damaged or edited; to keep an edit, remove {_CHECKSUM}"
            )
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(Recipe)
            if field.default is not dataclasses.MISSING
        }
        data: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in fields["data"].items()
        }
        found = {**defaults, "modules": {}, "inputs": {}, **fields, "data": data}
        if found.get("average") == 0.0:  # An option of earlier versions, off.
            del found["average"]
        for key in ("name", "epochs", "dataset", "model"):
            found[key]
        if not isinstance(found["name"], str):
            raise ValueError("name: expected a string")
        for key in ("modules", "inputs"):
            if not isinstance(found[key], dict):
                raise ValueError(f"{key}: expected an object")
        _check_data(data, moments=custom.is_reference(str(found["dataset"])))
        return found
    except FileNotFoundError as error:
        raise RunError(
            f"no run in {folder}: it has no recipe.json; expected a folder written by "
            "xnor-jax train"
        ) from error
    except (
        OSError,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise RunError(
            f"cannot read {path}: {_reason(error)}; restore the file, or start a new "
            "run"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no field {error}"
    return str(error) if isinstance(error, OSError | ValueError) else repr(error)


def _check_options(folder: Path, fields: Mapping[str, Any]) -> None:
    known = {"name", "data", "modules", "inputs"}
    known |= {field.name for field in dataclasses.fields(Recipe)}
    for option in [option for option in fields if option not in known]:
        raise RunError(
            f"{folder} holds a run with {option} {fields[option]!r}, an option that "
            "was removed or is of a newer version; start a new run without it "
            "(compare still reads this one)"
        )


def _check_data(data: Mapping[str, Any], *, moments: bool) -> None:
    """Check the description of the data set, with mean and std if `moments`."""

    def each(key: str, expected: str, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
        values = data[key]
        if not (isinstance(values, tuple) and values and all(map(fits, values))):
            raise ValueError(f"{key}: expected {expected}, got {values!r}")
        return values

    def size(value: Any) -> bool:
        return type(value) is int and value > 0

    shape = each("image_shape", "height, width and channels", size)
    if len(shape) != 3:
        raise ValueError(f"image_shape: expected height, width, channels, got {shape}")
    each("class_names", "strings", lambda name: isinstance(name, str))
    if not size(data["train_images"]):
        raise ValueError("train_images: expected a number of at least 1")
    for key, least in (("mean", 0), ("std", 1e-9)) if moments else ():
        values = each(
            key, "numbers", lambda x, least=least: type(x) is float and 1 >= x >= least
        )
        if len(values) != shape[2]:
            raise ValueError(f"{key}: expected one per channel, got {len(values)}")


def _warn_of_changes(folder: Path, modules: Mapping[str, str]) -> None:
    now = custom.digests(f"{name}:" for name in modules)
    _warn_of(folder, [name for name in now if now[name] != modules[name]])


def _warn_of(folder: Path, changed: Sequence[str]) -> None:
    if changed:
        warnings.warn(
            f"{' and '.join(changed)} changed since the run in {folder} began",
            RunWarning,
            stacklevel=3,
        )


def _difference(found: dict[str, Any], wanted: RunInfo) -> str:
    here = recipes.to_json(wanted.recipe)
    for field in here:
        if field == "epochs" and found[field] < here[field]:
            if obstacle := recipes.fixed_length(wanted.recipe):
                return (
                    f"its epochs is {found[field]}, not {here[field]}, and {obstacle} "
                    "depends on the number of epochs"
                )
            continue
        there = found[field]
        there = list(there) if isinstance(there, tuple) else there
        if there != here[field]:
            return f"its {field} is {there}, not {here[field]}"
    for field in ("image_shape", "class_names", "train_images"):
        if found["data"][field] != getattr(wanted, field):
            what = field.replace("_", " ")
            return f"its data set differs from this one in {what}"
    for field in ("mean", "std"):  # Only of a data set that is a function.
        there, now = found["data"].get(field), getattr(wanted.source, field)
        # Another processor may add in another order.
        if there is not None and not all(
            map(partial(math.isclose, rel_tol=1e-4), there, now)
        ):
            return (
                f"its images have the {field} {_numbers(there)}, not {_numbers(now)}, "
                "by which pixels are normalized"
            )
    return ""


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
