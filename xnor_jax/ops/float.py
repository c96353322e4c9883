"""The `float` backend: integers as sums of ±1 floats.

Float32 represents every integer up to 2²⁴, so the sums are exact for filters of up to
16,777,216 weights; larger filters raise a ValueError.
"""

from math import prod

import jax
import jax.numpy as jnp

from xnor_jax import convolution
from xnor_jax.geometry import Geometry
from xnor_jax.ops.epilogue import Epilogue, apply_epilogue

DTYPE = jnp.float32
LARGEST_EXACT_FILTER = 2**24


def conv_signs(
    x: jax.Array,
    kernel: jax.Array,
    epilogue: Epilogue,
    geometry: Geometry,
    groups: int = 1,
) -> jax.Array:
    """The convolution of signs given as floats.

    Args:
      x: Signs `[N, *spatial, C]`, float32.
      kernel: Signs `[*window, C / groups, C_out]`, float32.
      epilogue: Applied to the sums.
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: The number of channel groups.

    Raises:
      ValueError: If a filter has more than 2²⁴ weights.
    """
    weights = prod(kernel.shape[:-1])
    if weights > LARGEST_EXACT_FILTER:
        raise ValueError(
            f"float: expected a filter of at most {LARGEST_EXACT_FILTER} weights, "
            f"which float32 sums exactly, got {weights}; use the backend 'xla'"
        )
    if kernel.ndim == 2 and groups == 1:
        acc = convolution.dot(x, kernel, accumulator=jnp.float32)
    else:
        options = {"groups": groups, "accumulator": jnp.float32, **geometry.options}
        acc = convolution.conv(x, kernel, **options)
    # Fast algorithms (Winograd) may be slightly off; the exact sums are integers.
    return apply_epilogue(jnp.rint(acc).astype(jnp.int32), epilogue)
