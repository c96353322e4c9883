"""The ±1 arithmetic: one function an operation, several backends, the same integers.

Signs come as floats (`binary_conv`, `binary_matmul`) or as bits (`packed_conv`,
`packed_matmul`, the pools). Nothing outside this package knows how bits are laid out.
`run_network` runs a packed network in one call of the compiled backend.

All of it runs under `jit`, `vmap` and `shard_map`. Under `jit` alone, images that are
sharded along their first axis, and divide, stay on their devices; the compiled backend
gathers what else is sharded. A program with it has one mesh, and `jax.export` takes it
for a single device only. `pallas` gathers whatever is sharded, under `jit` alone, and
its programs for CUDA cannot be exported, nor lowered for other platforms at once. Other
backends have no such limits.
"""

from xnor_jax.ops.backends import available_backends
from xnor_jax.ops.bits import Bits, pack_bits, unpack_bits
from xnor_jax.ops.conv import binary_conv
from xnor_jax.ops.epilogue import Affine, Epilogue, Sums, Threshold, apply_epilogue
from xnor_jax.ops.kernel import PackedKernel, pack_kernel, unpack_kernel
from xnor_jax.ops.matmul import binary_matmul
from xnor_jax.ops.network import run_network
from xnor_jax.ops.packed import (
    packed_conv,
    packed_matmul,
    pool_bits,
    real_conv,
    sign_bits,
    sum_pool_bits,
)

__all__ = [
    "Affine",
    "Bits",
    "Epilogue",
    "PackedKernel",
    "Sums",
    "Threshold",
    "apply_epilogue",
    "available_backends",
    "binary_conv",
    "binary_matmul",
    "pack_bits",
    "pack_kernel",
    "packed_conv",
    "packed_matmul",
    "pool_bits",
    "real_conv",
    "run_network",
    "sign_bits",
    "sum_pool_bits",
    "unpack_bits",
    "unpack_kernel",
]
