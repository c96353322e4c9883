"""Calls of the library in programs that XLA splits over devices.

XLA cannot look into a call, and would gather its arguments on every device. It is told
here that images can be split, and that all else has to be whole.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def split_images(
    call: Callable[..., jax.Array], *, images: int, summed: bool = False
) -> Callable[..., jax.Array]:
    """A call that computes each device's images on that device.

    Args:
      call: Of arrays, to one array.
      images: How many of its arguments, the first ones, have images along their first
        axis.
      summed: Whether the result is a sum over the images; otherwise its first axis is
        theirs.

    Returns:
      The same call; in a program for several devices each takes its own images, and
      what `summed` says is added up over them.
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
        axes = args[0].sharding.spec[0]
        split = NamedSharding(mesh, PartitionSpec(axes))
        whole = NamedSharding(mesh, PartitionSpec())

        def local(*arrays: jax.Array) -> jax.Array:
            y = call(*arrays)
            return lax.psum(y, axes) if summed and axes else y

        given = tuple(split if at < images else whole for at in range(len(args)))
        return mesh, local, whole if summed else split, given

    divided = custom_partitioning(call)
    divided.def_partition(partition, sharding_rule=rule)
    return divided
