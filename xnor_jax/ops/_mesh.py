"""Arrays that are sharded over a mesh: images over Explicit axes, kernels over any.

Inside `over_images` the axes are Auto ones: XLA decides where everything is, as in
programs without types for shardings, and calls of the compiled library can be split
over devices.
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


def over_images(function: F, *, whole: int = 0) -> F:
    """The same function, for images on any mesh.

    Args:
      function: Of images `[N, ...]`, or their bits, first, and of other arrays. What it
        returns is sharded along its first axis as the images are.
      whole: How many arrays it returns after that, each whole on every device.
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
        out = (images, *[NamedSharding(mesh, P())] * whole) if whole else images
        run_inside: Any = jax.sharding.auto_axes(inside, out_sharding=out)
        return run_inside(x, args, arrays)

    return run  # type: ignore[return-value]


def whole(x: jax.Array) -> jax.Array:
    """The same array, whole on every device.

    Words of a kernel that is sharded over its channels would be sharded in turn, and
    there may be fewer of them than devices.
    """

    def rule(mesh: Any, args: Any, results: Any) -> tuple[str, dict[str, Any]]:
        # Factors of its own for the result: it is not sharded as the argument is.
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
    mapped.def_vmap(lambda size, batched, x: (whole(x), batched[0]))
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return x if manual else mapped(x)


def _same(x: jax.Array) -> jax.Array:
    return x


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array)
