"""The `xla` backend: popcounts in plain XLA, for any platform.

The words of each window form one row (im2col, 1/32 of the size of floats). A loop then
makes fused passes over all sums, each of which adds `popcount(a xor b)` for several
words.
"""

from collections.abc import Callable
from functools import reduce
from itertools import product
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xnor_jax.geometry import Geometry
from xnor_jax.ops.epilogue import Epilogue, apply_epilogue
from xnor_jax.ops.kernel import PackedKernel, columns

# Words per pass. XLA's CPU compiler fuses a slice of fewer than 16 words into the pass,
# which is then not vectorized: ten times slower.
_ONE_PASS = 32
_PASS = 24


def conv_words(
    words: jax.Array,
    kernel: PackedKernel,
    epilogue: Epilogue,
    geometry: Geometry,
    count: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The convolution of packed signs; taps outside the image add 0.

    Args:
      words: uint32 `[N, *spatial, G, Cw]`, with any number of spatial axes.
      kernel: The packed kernel, of `G` groups and `Cw` words per tap.
      epilogue: Applied to the sums.
      geometry: The windows over the image.
      count: A replacement for `popcounts`, the default.

    Returns:
      int32 or float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.
    """
    count = count or popcounts
    taps, groups = prod(kernel.window), kernel.groups
    matrix = columns(kernel)
    matrix = matrix.reshape(groups, taps, -1, matrix.shape[-1])
    flat = matrix.reshape(groups, -1, matrix.shape[-1])
    different = count(_patches(words, geometry), flat)
    # Modulo 2³²: the sum is right even if the product overflows.
    acc = jnp.int32(taps * kernel.in_features) - 2 * different
    if geometry.padded:
        # Words outside are 0, which is +1 in every channel: subtract their sums.
        negative = lax.population_count(matrix).astype(jnp.int32)
        signs = kernel.in_features - 2 * jnp.sum(negative, axis=2, dtype=jnp.int32)
        missing = _outside_sums(geometry, signs)
        acc = acc.reshape(-1, *missing.shape) - missing
    shape = (words.shape[0], *geometry.out, kernel.out_features)
    return apply_epilogue(acc.reshape(shape), epilogue)


def _patches(words: jax.Array, geometry: Geometry) -> jax.Array:
    """The words of every window: `[N · out, G, taps · Cw]`."""
    groups, each = words.shape[-2:]
    words = jnp.pad(words, ((0, 0), *geometry.padding, (0, 0), (0, 0)))
    shifted = [words[(slice(None), *taps)] for taps in product(*geometry.shifts)]
    patches = jnp.stack(shifted, axis=-2)
    return patches.reshape(-1, groups, len(shifted) * each)


def popcounts(a: jax.Array, b: jax.Array) -> jax.Array:
    """`Σ_w popcount(a[r, g, w] xor b[g, w, n])`.

    Args:
      a: uint32 `[R, G, W]`.
      b: uint32 `[G, W, N]`.

    Returns:
      int32 `[R, G, N]`.
    """
    count = a.shape[-1]
    passes = 1 if count <= _ONE_PASS else ceil(count / _PASS)
    size = ceil(count / passes)
    # Zero words on both sides add nothing.
    spare = (0, passes * size - count)
    a = jnp.pad(a, ((0, 0), (0, 0), spare))
    b = jnp.pad(b, ((0, 0), spare, (0, 0)))

    def one_pass(index):
        these = lax.dynamic_slice_in_dim(a, index * size, size, axis=2)
        those = lax.dynamic_slice_in_dim(b, index * size, size, axis=1)
        counts = [
            lax.population_count(these[:, :, w, None] ^ those[:, w])
            for w in range(size)
        ]
        return reduce(jnp.add, counts).astype(jnp.int32)

    if passes == 1:
        return one_pass(0)
    # Zeros that vary like the sums: under `shard_map`, `jnp.zeros` varies over no axis.
    zeros = (a[:, :, :1] ^ b[:, 0]).astype(jnp.int32) & 0
    return lax.fori_loop(0, passes, lambda i, acc: acc + one_pass(i), zeros)


def _outside_sums(geometry: Geometry, signs: jax.Array) -> jax.Array:
    """Each window's sum over its taps outside the image.

    Args:
      geometry: The windows.
      signs: Each tap's sum over the input channels, int32 `[G, taps, O]`.

    Returns:
      int32 `[out, G, O]`.
    """
    # Few distinct sets of taps are outside: sum once per set, then look up.
    axes = [np.unique(along, axis=0, return_inverse=True) for along in geometry.inside]
    tables = [table for table, _ in axes]
    joint = reduce(np.logical_and.outer, tables)
    joint = joint.transpose(*range(0, joint.ndim, 2), *range(1, joint.ndim, 2))
    outside = jnp.asarray(~joint.reshape(-1, signs.shape[1], 1, 1))
    entries = [entry.ravel() for _, entry in axes]
    which = np.ravel_multi_index(np.ix_(*entries), [len(table) for table in tables])

    def add(tap, acc):
        there = lax.dynamic_index_in_dim(outside, tap, axis=1, keepdims=False)
        these = lax.dynamic_index_in_dim(signs, tap, axis=1, keepdims=False)
        return acc + jnp.where(there, these, 0)

    first = jnp.where(outside[:, 0], signs[:, 0], 0)
    # A loop, so that XLA does not fuse it into the lookup and sum for every window.
    sums = lax.fori_loop(1, signs.shape[1], add, first)
    return sums[which.ravel()]
