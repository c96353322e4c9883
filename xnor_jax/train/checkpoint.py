"""Checkpoints: a run's state, saved by Orbax, its history, and a checksum per file."""

import contextlib
import hashlib
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xnor_jax._words import first_line
from xnor_jax.train.folder import RunError, RunWarning, write_atomically
from xnor_jax.train.step import TrainState

History = list[dict[str, Any]]

_STATE, _HISTORY, _CHECKSUMS = "state", "history.json", "checksums.json"


def best_record(history: History) -> dict[str, Any]:
    """Return the record of the highest test accuracy; of equals, the last."""
    return max(reversed(history), key=lambda record: record["test_accuracy"])


class Checkpoints:
    """The checkpoints of a run: the two newest epochs, and the best.

    Each is a folder named after its epoch. It is created atomically, with the SHA-256
    of its files; `newest` and `best` skip it if these no longer match.

    Args:
      folder: The run's folder.
    """

    def __init__(self, folder: Path):
        self._folder = (folder / "checkpoints").absolute()
        self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def newest(self) -> int | None:
        """Return the last saved epoch with undamaged files; None if none was saved.

        Each damaged checkpoint that is skipped causes a `RunWarning`.

        Raises:
          RunError: If all are damaged.
        """
        return self._first_undamaged(self._epochs())

    def best(self) -> int | None:
        """Return the undamaged epoch of highest test accuracy; of equals, the last."""
        newest = self.newest()
        if newest is None:
            return None
        history = self._history(newest)
        kept = [epoch for epoch in self._epochs() if epoch <= newest]
        kept.sort(key=lambda epoch: history[epoch - 1]["test_accuracy"], reverse=True)
        return self._first_undamaged(kept)

    def save(self, epoch: int, state: TrainState, history: History) -> None:
        """Save the state after an epoch, and the metrics of all epochs so far.

        Checkpoints of later epochs, which `newest` skipped as damaged, are removed.

        Raises:
          RunError: If it cannot be written; earlier checkpoints remain.
        """
        first = jax.process_index() == 0
        temporary = self._folder / f"{epoch}.tmp"
        try:
            if first:
                self._sweep()
                temporary.mkdir(parents=True)
            with _quiet():
                self._orbax.save(
                    temporary / _STATE, args=ocp.args.StandardSave(_to_arrays(state))
                )
            if first:
                write_atomically(temporary / _HISTORY, json.dumps(history))
                checksums = {
                    path.relative_to(temporary).as_posix(): _checksum(path)
                    for path in sorted(temporary.rglob("*"))
                    if path.is_file()
                }
                write_atomically(temporary / _CHECKSUMS, json.dumps(checksums))
                self._remove(epoch)
                temporary.rename(self._folder / str(epoch))
                self._prune(epoch, history)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise RunError(
                f"cannot save epoch {epoch} in {self._folder}: {first_line(error)}; "
                "check free space and permissions, then resume with --resume"
            ) from error

    def restore(self, epoch: int, like: TrainState) -> tuple[TrainState, History]:
        """Restore the state and the metrics that were saved after `epoch`.

        Args:
          epoch: An epoch returned by `newest` or `best`.
          like: A state of the same structure; shapes and dtypes suffice.

        Raises:
          RunError: If the checkpoint is of another network, or cannot be read.
        """
        place = self._folder / str(epoch)
        try:
            with _quiet():
                arrays = self._orbax.restore(
                    place / _STATE, args=ocp.args.StandardRestore()
                )
            return _from_arrays(arrays, like), self._history(epoch)
        except Exception as error:  # Orbax and TensorStore raise many types
            raise RunError(
                f"cannot read the checkpoint of epoch {epoch} in {self._folder}: "
                f"{first_line(error)}; restore its files from a backup, or start a new "
                "run in another folder"
            ) from error

    def _epochs(self) -> list[int]:
        """The saved epochs, newest first."""
        if not self._folder.is_dir():
            return []
        names = (path.name for path in self._folder.iterdir() if path.is_dir())
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _first_undamaged(self, epochs: list[int]) -> int | None:
        damages: dict[int, str] = {}
        for epoch in epochs:
            damage = self._damage(epoch)
            if damage is None:
                for number, what in damages.items():
                    if jax.process_index() == 0:
                        warnings.warn(
                            f"the checkpoint of epoch {number} in {self._folder} is "
                            f"damaged: {what}; epoch {epoch} is used instead",
                            RunWarning,
                            stacklevel=3,
                        )
                return epoch
            damages[epoch] = damage
        if not damages:
            return None
        all_of_them = "; ".join(f"epoch {n}: {what}" for n, what in damages.items())
        raise RunError(
            f"every checkpoint in {self._folder} is damaged ({all_of_them}); restore "
            "the files from a backup, or start a new run in another folder"
        )

    def _damage(self, epoch: int) -> str | None:
        """Describe the damage to the files of a checkpoint; None if there is none."""
        place = self._folder / str(epoch)
        try:
            text = (place / _CHECKSUMS).read_text()
            checksums = dict(json.loads(text))
        except (OSError, ValueError, TypeError):
            return f"{_CHECKSUMS} cannot be read"
        if text != json.dumps(checksums):
            return f"{_CHECKSUMS} has changed since it was written"
        for name, checksum in checksums.items():
            try:
                found = _checksum(place / name)
            except (OSError, ValueError):
                return f"{name} cannot be read"
            if found != checksum:
                return f"{name} has changed since it was written"
        return None

    def _history(self, epoch: int) -> History:
        return json.loads((self._folder / str(epoch) / _HISTORY).read_text())

    def _prune(self, epoch: int, history: History) -> None:
        """Keep `epoch`, the one saved before it, and the best: of equals, the last."""
        saved = [number for number in self._epochs() if number <= epoch]
        best = max(saved, key=lambda number: history[number - 1]["test_accuracy"])
        for number in self._epochs():
            if number not in (*saved[:2], best):
                self._remove(number)

    def _remove(self, epoch: int) -> None:
        """Remove a checkpoint if it exists, renaming it first to make this atomic."""
        place, gone = self._folder / str(epoch), self._folder / f"{epoch}.old.tmp"
        if place.exists():
            place.rename(gone)
            shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Remove partly written and partly removed checkpoints of a killed process."""
        for path in self._folder.glob("*.tmp"):
            shutil.rmtree(path)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's logging of errors and its threads: it also raises the errors."""
    logger = logging.getLogger("absl")
    level, print_error = logger.level, sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            print_error(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = print_others
    try:
        yield
        # Not after an error: Orbax closes its event loop before its threads end.
        sys.unraisablehook = print_error
    finally:
        logger.setLevel(level)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """Key the leaves by path, so that files do not depend on pytree nesting."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _from_arrays(arrays: dict[str, Any], like: TrainState) -> TrainState:
    def leaf(path, old):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        new = arrays[name]
        is_key = _is_key(old)
        shape = jax.eval_shape(jax.random.key_data, old).shape if is_key else old.shape
        if np.shape(new) != shape:
            raise ValueError(f"{name} has shape {np.shape(new)}, not {shape}")
        if is_key:
            impl = jax.random.key_impl(jnp.empty((), old.dtype))
            return jax.random.wrap_key_data(new, impl=impl)
        # A copy: JAX could alias the reader's buffer, and a step donates its input.
        return jnp.array(new, old.dtype)

    return jax.tree.map_with_path(leaf, like)
