"""Data-parallel training: batches are split over devices, all else is replicated.

The program is the same as for a single device; XLA partitions it by the batch's
sharding. BatchNorm's statistics are therefore those of the whole batch, and gradients
are summed over the devices before the gradient rule is applied. For a single device the
mesh is None, and the program has no sharding.
"""

from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xnor_jax.train.custom import RecipeError

T = TypeVar("T")

_AXIS = "batch"


def make_mesh(devices: int | None, batch_size: int) -> Mesh | None:
    """Make the mesh of the devices that share a batch; None for a single device.

    Args:
      devices: The number of JAX devices, at least 1. None for one device, or for all if
        there are several processes; any other number is then an error.
      batch_size: Images per step.

    Raises:
      RecipeError: If the number is not allowed or does not divide the batch size.
    """
    found, processes = jax.devices(), jax.process_count()
    if devices is None:
        devices = 1 if processes == 1 else len(found)
    if not 1 <= devices <= len(found):
        raise RecipeError(
            f"expected 1 to {len(found)} (the number of {found[0].platform} devices), "
            f"got {devices}",
            field="devices",
        )
    if processes > 1 and devices != len(found):
        raise RecipeError(
            f"expected {len(found)}, all devices of the {processes} processes, got "
            f"{devices}",
            field="devices",
        )
    if rest := batch_size % devices:
        near = [n for n in (batch_size - rest, batch_size - rest + devices) if n]
        raise RecipeError(
            f"{batch_size} is not divisible by {devices} devices; the nearest "
            f"multiples: {' and '.join(map(str, near))}",
            field="batch_size",
        )
    return None if devices == 1 else Mesh(np.array(found[:devices]), (_AXIS,))


def replicate(tree: T, mesh: Mesh | None) -> T:
    """Replicate the tree on every device of the mesh."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() > 1:
        # Across processes, device_put fails on keys and sends all values to compare.
        return jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return jax.device_put(tree, everywhere)


def put_batch(batch: T, mesh: Mesh | None) -> T:
    """Put this process's rows of a batch on its devices; return the global batch."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    put = partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(put, batch)


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Split the first axis over the devices of the mesh, in a jitted function."""
    if mesh is None:
        return x
    return with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(_AXIS)))


def constrain_replicated(tree: T, mesh: Mesh | None) -> T:
    """Replicate the tree on every device of the mesh, in a jitted function."""
    if mesh is None:
        return tree
    return with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
