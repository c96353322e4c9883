"""Checkpoints through Orbax: atomic, the newest and the best kept."""

import contextlib
import logging
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from xnor_jax.train.folder import RunError
from xnor_jax.train.step import TrainState

History = list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of a run's folder, numbered by epoch.

    Args:
      folder: The run's folder.
    """

    def __init__(self, folder: Path):
        best_fn = operator.itemgetter("test_accuracy")
        policy = policies.AnyPreservationPolicy(
            [policies.LatestN(n=1), policies.BestN(get_metric_fn=best_fn, n=1)]
        )
        self._folder = (folder / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=best_fn,
                preservation_policy=policy,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def newest(self) -> int | None:
        """The last epoch that was saved."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The saved epoch of the highest test accuracy."""
        return self._manager.best_step()

    def save(self, epoch: int, state: TrainState, history: History) -> None:
        """Save the state after an epoch, and the metrics of all epochs so far.

        Raises:
          RunError: If it cannot be written; what was saved before is still there.
        """
        try:
            with _quiet():
                self._manager.save(
                    epoch,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(_to_arrays(state)),
                        history=ocp.args.JsonSave({"epochs": history}),
                    ),
                    metrics={"test_accuracy": history[-1]["test_accuracy"]},
                )
                self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise their own, of any kind
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(
                f"cannot save epoch {epoch} in {self._folder}: {reason[0][:200]}; see "
                "to its room and its rights, then go on with --resume"
            ) from error

    def restore(self, epoch: int, like: TrainState) -> tuple[TrainState, History]:
        """Read the state and the metrics that were saved after `epoch`.

        Args:
          epoch: A saved epoch.
          like: A state of the same structure, such as the initial one.

        Raises:
          RunError: If the checkpoint is damaged, or of another network.
        """
        try:
            with _quiet():
                saved = self._manager.restore(
                    epoch,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(),
                        history=ocp.args.JsonRestore(),
                    ),
                )
            return _from_arrays(saved["state"], like), saved["history"]["epochs"]
        except Exception as error:  # Orbax and TensorStore raise their own, of any kind
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(
                f"cannot read the checkpoint of epoch {epoch} in {self._folder}: "
                f"{reason[0][:200]}; delete its folder to go on from the one "
                "before, or train anew"
            ) from error

    def close(self) -> None:
        """Let go of the folder."""
        with _quiet():
            self._manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging what it raises too, where it can be told in a line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """By path, so that a file does not depend on how a library nests its pytrees."""
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
        shape = np.shape(jax.random.key_data(old) if _is_key(old) else old)
        if np.shape(new) != shape:
            raise ValueError(f"{name} has shape {np.shape(new)}, not {shape}")
        if _is_key(old):
            return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        # A copy: JAX may otherwise alias the reader's buffer, and a step donates it.
        return jnp.array(new, old.dtype)

    return jax.tree.map_with_path(leaf, like)
