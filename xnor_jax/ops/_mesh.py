"""Operations on images that are sharded over a mesh's Explicit axes.

Inside, the axes are Auto ones: XLA decides where everything is, as in programs without
types for shardings, and calls of the compiled library can be split over devices.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding
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


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array)
