"""A run's folder: whose it is, and its small files, written whole or not at all."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from xnor_jax.data import ImageSet
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
# Beside these, in runs on a set that stays on disk: the share of the training time in
# which the devices waited for a batch.
DATA_WAIT = "data_wait"


class RunError(Exception):
    """A run that cannot start, go on or be read."""


class RunWarning(UserWarning):
    """A run that goes on, or is read, otherwise than asked."""


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What `recipe.json` says: enough to rebuild the network without the data."""

    name: str  # the preset's
    recipe: Recipe
    image_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    train_images: int

    @classmethod
    def of(cls, name: str, recipe: Recipe, dataset: ImageSet) -> "RunInfo":
        """Describe a run of `recipe` on `dataset`."""
        shape, names = dataset.image_shape, dataset.class_names
        return cls(name, recipe, shape, names, dataset.train_images)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images."""
        return self.train_images // self.recipe.batch_size


def open_folder(folder: Path, info: RunInfo, *, resume: bool) -> None:
    """Make the run's folder, or find it ready to go on.

    Args:
      folder: Where the run is, or will be.
      info: The run.
      resume: Whether to go on with what is there.

    Raises:
      RunError: If something else is there, or it cannot be written.
    """
    existing = folder / "recipe.json"
    if existing.exists():
        found = read_info(folder)
        if not resume:
            raise RunError(
                f"{folder} holds a run of {found.name} already; go on with --resume, "
                "or give another folder with --output"
            )
        difference = _difference(found, info)
        if difference:
            raise RunError(
                f"{folder} holds another run: {difference}; give the same recipe, or "
                "another folder with --output"
            )
        return
    if resume and not folder.exists():
        raise RunError(f"no run in {folder} to resume; leave --resume out to start one")
    try:
        # Killed before the rename, the start of a run leaves this alone.
        own = _temporary(existing)
        if folder.exists() and any(path != own for path in folder.iterdir()):
            raise RunError(
                f"{folder} holds other files and no run; give another folder with "
                "--output"
            )
        folder.mkdir(parents=True, exist_ok=True)
        fields = {
            "name": info.name,
            **recipes.to_json(info.recipe),
            "data": {
                "image_shape": list(info.image_shape),
                "class_names": list(info.class_names),
                "train_images": info.train_images,
            },
        }
        write_atomically(existing, json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise RunError(
            f"cannot write in {folder}: {error.strerror or error}; give a folder that "
            "can be written with --output"
        ) from error


def read_info(folder: Path) -> RunInfo:
    """Read `recipe.json`.

    Raises:
      RunError: If the folder has none, or it is damaged.
    """
    path = folder / "recipe.json"
    try:
        fields = json.loads(path.read_text())
        name, data = fields.pop("name"), fields.pop("data")
        return RunInfo(
            name,
            recipes.from_json(fields),
            tuple(data["image_shape"]),
            tuple(data["class_names"]),
            int(data["train_images"]),
        )
    except FileNotFoundError as error:
        raise RunError(
            f"no run in {folder}: it has no recipe.json; expected a folder that "
            "xnor-jax train wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error if isinstance(error, RecipeError | OSError) else repr(error)
        raise RunError(
            f"cannot read {path}: {reason}; restore the file, or train anew"
        ) from error


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `metrics.jsonl`, one object an epoch, whole, as the checkpoint has it."""
    lines = [
        json.dumps({key: epoch[key] for key in (*METRICS, DATA_WAIT) if key in epoch})
        for epoch in history
    ]
    write_atomically(folder / "metrics.jsonl", "".join(line + "\n" for line in lines))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by `text`; after a crash it is the old one or the new one."""
    temporary = _temporary(path)
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def free_folder(base: Path) -> Path:
    """`base`, or the first of `base-2`, `base-3`, … that does not exist yet."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def newest_folder(base: Path) -> Path:
    """The last folder that `free_folder(base)` gave; `base` if it never did."""
    folder, number = base, 1
    while (following := base.with_name(f"{base.name}-{number + 1}")).exists():
        folder, number = following, number + 1
    return folder


def _difference(found: RunInfo, wanted: RunInfo) -> str:
    there, here = recipes.to_json(found.recipe), recipes.to_json(wanted.recipe)
    for field in here:
        if there[field] != here[field]:
            return f"its {field} is {there[field]}, not {here[field]}"
    for field in ("image_shape", "class_names", "train_images"):
        if getattr(found, field) != getattr(wanted, field):
            return f"its data's {field} are not those of this data set"
    return ""
