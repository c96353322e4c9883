"""The `pallas` backend: in programs for CUDA, popcounts in a custom kernel.

It differs from the `xla` backend only in the most expensive step: counting the bits in
which rows and columns differ. Each thread block keeps a tile of counts in registers and
loops over the words, so that no intermediate count goes through memory. The GPU needs
compute capability 8.0 or above, as XLA's Triton requires.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# Rows and columns of a thread block's tile of counts; Triton requires powers of 2.
# 64 · 64 int32 over 4 · 32 threads are 32 registers per thread.
TILE = 64
WARPS = 4


def popcounts(a: jax.Array, b: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`Σ_w popcount(a[r, g, w] xor b[g, w, n])`.

    Args:
      a: uint32 `[R, G, W]`.
      b: uint32 `[G, W, N]`.
      interpret: Run the kernel in plain XLA, on any platform; for tests.

    Returns:
      int32 `[R, G, N]`.
    """
    count = jax.custom_batching.custom_vmap(partial(_popcounts, interpret))

    @count.def_vmap
    def over_rows(size, mapped, a, b):
        # Merge the mapped axis into the rows, which fills the tiles better.
        if not mapped[1]:
            counts = popcounts(a.reshape(-1, *a.shape[2:]), b, interpret=interpret)
            return counts.reshape(*a.shape[:2], *counts.shape[1:]), True
        axes = [0 if axis else None for axis in mapped]
        return jax.vmap(partial(_popcounts, interpret), axes)(a, b), True

    return count(a, b)


def _popcounts(interpret: bool, a: jax.Array, b: jax.Array) -> jax.Array:
    # Imported here, so that programs without a GPU do not wait for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, groups, words), columns = a.shape, b.shape[-1]
    if 0 in (rows, groups, words, columns):
        return jnp.zeros((rows, groups, columns), jnp.int32)
    # Words before rows, so that neighbouring threads read neighbouring values; whole
    # tiles, since a kernel's reads and writes are not checked for bounds.
    spare = ((0, 0), (0, 0))
    a = jnp.pad(a.transpose(1, 2, 0), (*spare, (0, -rows % TILE)))
    b = jnp.pad(b, (*spare, (0, -columns % TILE)))

    # Under `shard_map`, the mesh axes over which the counts vary.
    varying = jax.typeof(a[0, 0, 0] ^ b[0, 0, 0]).manual_axis_type

    def popcount(x):
        if interpret:
            return lax.population_count(x).astype(jnp.int32)
        # XLA's Triton does not support `lax.population_count`.
        (counts,) = triton.elementwise_inline_asm(
            "popc.b32 $0, $1;",
            args=[x],
            constraints="=r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
        )
        return counts

    def kernel(a_ref, b_ref, counts_ref):
        def add(word, counts):
            return counts + popcount(a_ref[word, :][:, None] ^ b_ref[word, :][None])

        zeros = jnp.zeros((TILE, TILE), jnp.int32)
        counts_ref[...] = lax.fori_loop(0, words, add, zeros)

    counts = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(
            (groups, a.shape[-1], b.shape[-1]), jnp.int32, manual_axis_type=varying
        ),
        # CUDA limits all axes but the first to 65,535 blocks.
        grid=(a.shape[-1] // TILE, b.shape[-1] // TILE, groups),
        in_specs=[
            pl.BlockSpec((None, words, TILE), lambda r, n, g: (g, 0, r)),
            pl.BlockSpec((None, words, TILE), lambda r, n, g: (g, 0, n)),
        ],
        out_specs=pl.BlockSpec((None, TILE, TILE), lambda r, n, g: (g, r, n)),
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
    )(a, b)
    return counts[:, :rows, :columns].transpose(1, 0, 2)
