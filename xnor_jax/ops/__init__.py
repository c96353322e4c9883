"""Operations on signs, with several backends that give identical integers.

Signs are given as floats (`binary_conv`, `binary_matmul`) or as bits (`packed_conv`,
`packed_matmul`, the pools). No module outside this package depends on the bit layout.
`run_network` runs a packed network in one call of the compiled backend.

All operations support `jit`, `vmap` and `shard_map`. Under `jit` alone, images sharded
along their first axis stay on their devices if the axis divides evenly; the compiled
backend gathers all other sharded arrays. A program that uses it has one mesh, and
`jax.export` supports it for a single device only. `pallas` gathers all sharded arrays
under `jit` alone, and its CUDA programs cannot be exported or lowered for several
platforms at once. The other backends have no such limits.
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
