"""Partitioning of the library's calls in programs for several devices.

A call is opaque to XLA, which would gather its arguments on every device. The rules
here split images and replicate all other arrays. Images that do not divide evenly among
the devices are replicated too: XLA would pad the last shard with arbitrary values.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def split_images(
    call: Callable[..., jax.Array], *, images: int, summed: bool = False
) -> Callable[..., jax.Array]:
    """A call that computes each device's images on that device.

    Args:
      call: A function from arrays to one array.
      images: The number of leading arguments with images along their first axis.
      summed: Whether the result is a sum over the images; otherwise images are along
        its first axis.

    Returns:
      The same call. In a program for several devices, each device computes its own
      images, and a summed result is added up over the devices.
    """

    def rule(mesh: Any, args: Any, results: Any) -> tuple[str, dict[str, Any]]:
        whole: list[str] = []

        def factors(array: Any, *, split: bool) -> str:
            first = len(whole)
            whole.extend(f"f{i}" for i in range(first, first + array.rank - split))
            return " ".join(["n"] * split + whole[first:])

        given = [factors(array, split=at < images) for at, array in enumerate(args)]
        (made,) = (factors(array, split=not summed) for array in results)
        kinds = {
            "need_replication_factors": tuple(whole),
            "reduction_factors": ("n",) if summed else (),
        }
        return f"{', '.join(given)} -> {made}", kinds

    def partition(mesh: Any, args: Any, result: Any) -> Any:
        # Other arguments with images are resharded like the first.
        axes = _dividing(args[0])
        if mesh.empty:
            mesh = Mesh(np.array([*args[0].sharding.device_set]), ("devices",))
        split = NamedSharding(mesh, PartitionSpec(axes))
        whole = NamedSharding(mesh, PartitionSpec())

        def local(*arrays: jax.Array) -> jax.Array:
            y = call(*arrays)
            return lax.psum(y, axes) if summed and axes else y

        given = tuple(split if at < images else whole for at in range(len(args)))
        return mesh, local, whole if summed else split, given

    divided = custom_partitioning(call)
    divided.def_partition(partition, sharding_rule=rule)

    def run(*arrays: jax.Array) -> jax.Array:
        # Under `shard_map` the arrays are per device already.
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return call(*arrays) if manual else divided(*arrays)

    return run


def _dividing(x: Any) -> tuple[str, ...]:
    """The mesh axes that shard the first axis of `x`, if it divides evenly."""
    if not isinstance(x.sharding, NamedSharding):
        return ()
    axes = x.sharding.spec[0] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    shares = prod(x.sharding.mesh.shape[axis] for axis in axes)
    return () if x.shape[0] % shares else axes
