"""The `gpu` backend: int8 products with int32 sums.

It runs on every platform and targets the int8 tensor cores of GPUs. Im2col turns the
convolution into one matrix product: XLA's GPU compiler has no int8 convolution with
int32 sums (jax-ml/jax#7637).
"""

from itertools import product
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax.geometry import Geometry
from xnor_jax.ops.epilogue import Epilogue, apply_epilogue

DTYPE = jnp.int8


def conv_signs(
    x: jax.Array,
    kernel: jax.Array,
    epilogue: Epilogue,
    geometry: Geometry,
    groups: int = 1,
) -> jax.Array:
    """The convolution of signs given as int8.

    Args:
      x: Signs `[N, *spatial, C]`, int8.
      kernel: Signs `[*window, C / groups, C_out]`, int8.
      epilogue: Applied to the sums.
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: The number of channel groups.
    """
    weights, features = prod(kernel.shape[:-1]), kernel.shape[-1]
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    x = jnp.pad(x, ((0, 0), *geometry.padding, (0, 0), (0, 0)))
    taps = [x[(slice(None), *shift)] for shift in product(*geometry.shifts)]
    # Rows and columns of each group: [M, G, K] and [K, G, O].
    rows = jnp.stack(taps, axis=-2).reshape(-1, groups, weights)
    matrix = kernel.reshape(weights, groups, features // groups)
    sums = lax.dot_general(
        rows,
        matrix,
        (((2,), (0,)), ((1,), (1,))),
        precision=lax.Precision.DEFAULT,  # a context sets it for floats
        preferred_element_type=jnp.int32,
    )
    sums = jnp.moveaxis(sums, 0, 1).reshape(x.shape[0], *geometry.out, features)
    return apply_epilogue(sums, epilogue)
