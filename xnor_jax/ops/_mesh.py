"""Sharded arrays: images over Explicit mesh axes, kernels over axes of any type.

Inside `over_images` the mesh axes are Auto: XLA chooses the shardings, as in programs
without explicit sharding, and calls of the compiled library can be split over devices.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

F = TypeVar("F", bound=Callable[..., Any])


def over_images(function: F, *, replicated: int = 0) -> F:
    """Extend a function to images on any mesh.

    Args:
      function: Takes images `[N, ...]`, or their bits, then other arrays. Its first
        result is sharded along its first axis like the images.
      replicated: The number of further results, each replicated.
    """

    @wraps(function)
    def run(x: Any, *args: Any, **options: Any) -> Any:
        leaves = jax.tree.leaves((x, args, options))
        meshes = [jax.typeof(a).sharding.mesh for a in leaves if _is_array(a)]
        mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
        if mesh is None:
            return function(x, *args, **options)
        arrays = {name: a for name, a in options.items() if _is_array(a)}
        rest = {name: a for name, a in options.items() if name not in arrays}

        def inside(x: Any, args: Any, arrays: Any) -> Any:
            return function(x, *args, **arrays, **rest)

        spec = jax.typeof(jax.tree.leaves(x)[0]).sharding.spec
        images = NamedSharding(mesh, P(spec[0] if spec else None))
        further = [NamedSharding(mesh, P())] * replicated
        out = (images, *further) if further else images
        run_inside: Any = jax.sharding.auto_axes(inside, out_sharding=out)
        return run_inside(x, args, arrays)

    return run  # type: ignore[return-value]


def replicate(x: jax.Array) -> jax.Array:
    """Replicate an array over all devices.

    If a kernel were sharded over its channels, its words would be too, and there may be
    fewer words than devices.
    """

    def rule(mesh: Any, args: Any, results: Any) -> tuple[str, dict[str, Any]]:
        # The result has its own factors: its sharding differs from the argument's.
        given, made = ([f"{f}{i}" for i in range(args[0].rank)] for f in "gm")
        factors = {"need_replication_factors": (*given, *made)}
        return f"{' '.join(given)} -> {' '.join(made)}", factors

    def partition(mesh: Any, args: Any, result: Any) -> Any:
        if mesh.empty:
            mesh = Mesh(np.array([*args[0].sharding.device_set]), ("devices",))
        everywhere = NamedSharding(mesh, P())
        return mesh, _same, everywhere, (everywhere,)

    gathered = custom_partitioning(_same)
    gathered.def_partition(partition, sharding_rule=rule)
    mapped = jax.custom_batching.custom_vmap(gathered)
    mapped.def_vmap(lambda size, batched, x: (replicate(x), batched[0]))
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return x if manual else mapped(x)


def _same(x: jax.Array) -> jax.Array:
    return x


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array)
