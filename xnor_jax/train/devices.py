"""Data parallel training: each batch is split over devices, everything else is on all.

The program is the one of a single device; XLA splits it by the batch's sharding. So
BatchNorm's statistics are those of the whole batch, and gradients are summed over the
devices before the rule of binarization sees them.
"""

from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xnor_jax.train.folder import RunError

T = TypeVar("T")

_AXIS = "batch"


def make_mesh(devices: int, batch_size: int) -> Mesh | None:
    """The devices that share a batch; None for a single one.

    Args:
      devices: How many of JAX's devices, at least 1.
      batch_size: Images a step.

    Raises:
      RunError: If there are not so many, or the batch does not divide among them.
    """
    found = jax.devices()
    if not 1 <= devices <= len(found):
        raise RunError(
            f"--devices: expected 1 to {len(found)}, the devices that JAX has here "
            f"({found[0].platform}), got {devices}"
        )
    if rest := batch_size % devices:
        near = [n for n in (batch_size - rest, batch_size - rest + devices) if n]
        raise RunError(
            f"--batch-size: {batch_size} images do not divide among {devices} devices; "
            f"the nearest that do: {' and '.join(map(str, near))}"
        )
    return None if devices == 1 else Mesh(np.array(found[:devices]), (_AXIS,))


def replicate(tree: T, mesh: Mesh | None) -> T:
    """The tree on every device of the mesh."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Within a program: the first axis over the devices of the mesh."""
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    return jax.lax.with_sharding_constraint(x, sharding)


def whole(tree: T, mesh: Mesh | None) -> T:
    """Within a program: the tree on every device of the mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
