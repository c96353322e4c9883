"""The `pallas` backend: in programs for CUDA, popcounts in a kernel of our own.

It is the `xla` backend but for the step that costs: counting the bits in which rows and
columns differ. Each block of threads keeps a tile of the counts in registers and walks
along the words, so that no count goes through memory on the way. The GPU has to be of
compute capability 8.0 or above, as XLA's Triton asks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# A tile of counts: rows and columns of one block of threads, powers of 2 as Triton
# wants them. 64 · 64 int32 over 4 · 32 threads are 32 registers a thread.
TILE = 64
WARPS = 4


def popcounts(a: jax.Array, b: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`Σ_w popcount(a[r, g, w] xor b[g, w, n])`.

    Args:
      a: uint32 `[R, G, W]`.
      b: uint32 `[G, W, N]`.
      interpret: Run the kernel in plain XLA, on any platform: for tests.

    Returns:
      int32 `[R, G, N]`.
    """
    count = jax.custom_batching.custom_vmap(partial(_popcounts, interpret))

    @count.def_vmap
    def over_rows(size, mapped, a, b):
        # Tiles are filled with the rows of all, not with those of each.
        if not mapped[1]:
            counts = popcounts(a.reshape(-1, *a.shape[2:]), b, interpret=interpret)
            return counts.reshape(*a.shape[:2], *counts.shape[1:]), True
        axes = [0 if axis else None for axis in mapped]
        return jax.vmap(partial(_popcounts, interpret), axes)(a, b), True

    return count(a, b)


def _popcounts(interpret: bool, a: jax.Array, b: jax.Array) -> jax.Array:
    # Here, for what is not on a GPU need not wait for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, groups, words), columns = a.shape, b.shape[-1]
    if 0 in (rows, groups, words, columns):
        return jnp.zeros((rows, groups, columns), jnp.int32)
    # Word by word, so that neighbouring threads read neighbouring numbers; whole tiles,
    # for a kernel's reads and writes are not checked against the edges.
    spare = ((0, 0), (0, 0))
    a = jnp.pad(a.transpose(1, 2, 0), (*spare, (0, -rows % TILE)))
    b = jnp.pad(b, (*spare, (0, -columns % TILE)))

    # In `shard_map`, over which axes of the mesh the counts vary.
    varying = jax.typeof(a[0, 0, 0] ^ b[0, 0, 0]).manual_axis_type

    def popcount(x):
        if interpret:
            return lax.population_count(x).astype(jnp.int32)
        # XLA's Triton does not know `lax.population_count`.
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
        # CUDA bounds all axes but the first by 65,535 blocks.
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
