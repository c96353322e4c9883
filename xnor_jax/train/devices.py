"""Data parallel training: each batch is split over devices, everything else is on all.

The program is the one of a single device; XLA splits it by the batch's sharding. So
BatchNorm's statistics are those of the whole batch, and gradients are summed over the
devices before the rule of binarization sees them. Where there is a single device the
mesh is None, and its program holds no sharding at all.
"""

from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xnor_jax.train.own import RecipeError

T = TypeVar("T")

_AXIS = "batch"


def make_mesh(devices: int | None, batch_size: int) -> Mesh | None:
    """The devices that share a batch; None for a single one.

    Args:
      devices: How many of JAX's devices, at least 1; None for one, and in several
        processes for all of theirs, of which none can be left out.
      batch_size: Images a step.

    Raises:
      RecipeError: If there are not so many, or the batch does not divide among them.
    """
    found, processes = jax.devices(), jax.process_count()
    if devices is None:
        devices = 1 if processes == 1 else len(found)
    if not 1 <= devices <= len(found):
        raise RecipeError(
            f"expected 1 to {len(found)}, which JAX has here ({found[0].platform}), "
            f"got {devices}",
            field="devices",
        )
    if processes > 1 and devices != len(found):
        raise RecipeError(
            f"expected all {len(found)} of the {processes} processes, got {devices}",
            field="devices",
        )
    if rest := batch_size % devices:
        near = [n for n in (batch_size - rest, batch_size - rest + devices) if n]
        raise RecipeError(
            f"{batch_size} images do not divide among {devices} devices; the nearest "
            f"that do: {' and '.join(map(str, near))}",
            field="batch_size",
        )
    return None if devices == 1 else Mesh(np.array(found[:devices]), (_AXIS,))


def replicate(tree: T, mesh: Mesh | None) -> T:
    """The tree on every device of the mesh."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() > 1:
        # device_put knows no keys there, and sends all values round to compare them.
        return jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)
    return jax.device_put(tree, everywhere)


def put_batch(batch: T, mesh: Mesh | None) -> T:
    """This process's rows of a batch, onto its devices: together they are the batch."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, PartitionSpec(_AXIS))
    put = partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(put, batch)


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """In a program: the first axis is split over the devices of the mesh."""
    if mesh is None:
        return x
    return with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(_AXIS)))


def constrain_replicated(tree: T, mesh: Mesh | None) -> T:
    """In a program: the tree is on every device of the mesh."""
    if mesh is None:
        return tree
    return with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))
