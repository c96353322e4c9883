"""Several operations in one call of the compiled backend."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from xnor_jax.ops import _inference, cpu
from xnor_jax.ops.bits import Bits
from xnor_jax.ops.cpu.steps import Step


def run_chain(
    x: jax.Array | Bits, steps: Sequence[Step], shape: tuple[int, ...], *, bits: bool
) -> jax.Array | Bits:
    """Run operations one after another, with no return to XLA between them.

    The library keeps its threads awake from one operation to the next, which for a
    single image is most of what a second thread is good for.

    Args:
      x: float32 images `[N, *spatial, C]`, at most two spatial axes, or their bits; at
        least one image.
      steps: What to run; see `xnor_jax.ops.steps`.
      shape: Of the result, without the batch: `[*spatial, C]`.
      bits: Whether it is bits; otherwise float32.

    Returns:
      float32 `[N, *shape]`, or bits of that shape.

    Raises:
      RuntimeError: If the library was not built.
      TypeError: When differentiated.
    """
    x, steps = _inference.no_gradient("run_chain", (x, tuple(steps)))
    array = x.words if isinstance(x, Bits) else x
    *spatial, features = shape
    dtype = jnp.uint32 if bits else jnp.float32
    y = cpu.run(array, steps, tuple(spatial), features, dtype)
    return Bits(y, features) if bits else y
