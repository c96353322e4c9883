"""Backends for products of signs: identical integers at different speeds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax import convolution
from xnor_jax._kernel import sign
from xnor_jax.geometry import Geometry
from xnor_jax.ops import bits, cpu, gpu, pallas, xla
from xnor_jax.ops import float as floats
from xnor_jax.ops.bits import WORD
from xnor_jax.ops.cpu import operations
from xnor_jax.ops.epilogue import Affine, Epilogue, Sums, Threshold, apply_epilogue
from xnor_jax.ops.kernel import PackedKernel, pack_kernel, unpack_kernel
from xnor_jax.registry import BACKENDS, expected

Function = Callable[..., jax.Array]

# `n - 2 · popcount` is int32; the compiled library supports half of its range.
_LARGEST_PACKED_FILTER = 2**30 - 1


@dataclass(frozen=True)
class Backend:
    """An implementation of products of signs, and its capabilities.

    Attributes:
      conv_words: `(words, kernel, epilogue, geometry) -> result`: the convolution of
        packed signs, followed by the epilogue.
      numbers: The module that multiplies signs as numbers of its `DTYPE`; None if they
        are multiplied as bits.
      gradient: Whether layers can train with it.
      axes: The largest number of spatial axes.
      is_available: Whether it can run here.
    """

    conv_words: Function
    numbers: Any = None
    gradient: bool = False
    axes: int = 3
    is_available: Callable[[], bool] = lambda: True


def _as_numbers(numbers: Any) -> Function:
    def conv_words(words, kernel, epilogue, geometry):
        x = bits.signs(words, kernel.in_features, numbers.DTYPE)
        return numbers.conv_signs(
            x.reshape(*x.shape[:-2], -1),
            unpack_kernel(kernel).astype(numbers.DTYPE),
            epilogue,
            geometry,
            kernel.groups,
        )

    return conv_words


def _pallas(words, kernel, epilogue, geometry):
    counted = partial(xla.conv_words, geometry=geometry)
    own = partial(counted, count=pallas.popcounts)
    return lax.platform_dependent(words, kernel, epilogue, cuda=own, default=counted)


def _cpu(words, kernel, epilogue, geometry):
    # The library's thresholds need whole words per group: other groups would share one.
    each = kernel.out_features // kernel.groups
    if isinstance(epilogue, Threshold) and kernel.groups > 1 and each % WORD:
        return apply_epilogue(_cpu(words, kernel, Sums(), geometry), epilogue)
    x = words.reshape(*words.shape[:-2], -1)
    operation = operations.conv(kernel, epilogue, geometry)
    return _run(x, operation, epilogue, jnp.int32, geometry.out, kernel.out_features)


# The entries of `registry.BACKENDS`.
FLOAT = Backend(_as_numbers(floats), numbers=floats, gradient=True)
XLA = Backend(xla.conv_words)
GPU = Backend(_as_numbers(gpu), numbers=gpu)
PALLAS = Backend(_pallas)
CPU = Backend(
    _cpu, gradient=True, axes=cpu.RANK, is_available=lambda: cpu.is_available()
)


def available_backends() -> tuple[str, ...]:
    """The backends that can be selected by name here.

    Returns:
      `"float"`, `"xla"`, `"gpu"` and `"pallas"`, which run on every platform (the last
      needs compute capability 8.0 on CUDA, and is `"xla"` elsewhere), and `"cpu"` if
      the compiled library is loaded.
    """
    return tuple(name for name, found in BACKENDS.items() if found.is_available())


def resolve(where: str, backend: str, rank: int = 2, *, gradient: bool = False) -> str:
    """Check a backend's name and resolve `"auto"`.

    Args:
      where: The public function's name, for errors.
      backend: `"auto"` or one of the names.
      rank: The operation's number of spatial axes.
      gradient: Whether the operation needs gradients.

    Returns:
      A name; `"auto"` stands for `"cpu"` in programs for a CPU and `"xla"` in others.

    Raises:
      ValueError: If the backend is unknown, or does not support the rank or gradients.
      RuntimeError: If it is not available here.
    """
    names = ("auto", *(n for n, b in BACKENDS.items() if b.gradient or not gradient))
    if backend == "auto":
        return "auto" if CPU.is_available() and rank <= CPU.axes else "xla"
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(
            f"{where}: unknown backend {backend!r}; {expected(str(backend), names)}"
        )
    found = BACKENDS[backend]
    if gradient and not found.gradient:
        raise ValueError(
            f"{where}: the backend {backend!r} has no gradients; expected one of "
            f"{', '.join(names)}"
        )
    if not found.is_available():
        raise RuntimeError(
            f"{where}: the backend {backend!r} is not available: its library was not "
            "built; install from source with a C++ compiler, or use 'auto'"
        )
    if rank > found.axes:
        raise ValueError(
            f"{where}: the backend {backend!r} supports at most {found.axes} spatial "
            f"axes, got {rank}; use 'auto' or {'float' if gradient else 'xla'!r}"
        )
    return backend


def pack(backend: str, x: jax.Array) -> jax.Array:
    """Words of the signs of `x`, `[..., C]`: uint32 `[..., ceil(C / 32)]`.

    Args:
      backend: A result of `resolve`.
      x: Real numbers.
    """
    if not _compiles(backend, x):
        return bits.pack_signs(x)

    def compiled(x):
        rows = x.reshape(-1, x.shape[-1])
        words = cpu.run(rows, [operations.pack()], (), x.shape[-1], jnp.uint32)
        return words.reshape(*x.shape[:-1], -1)

    return choose(backend, compiled, bits.pack_signs, x.astype(jnp.float32))


def product(
    where: str,
    backend: str,
    x: jax.Array,
    kernel: jax.Array,
    geometry: Geometry,
    groups: int = 1,
) -> jax.Array:
    """The sums of a product of unpacked signs, by the given backend.

    Args:
      where: The public function's name, for errors.
      backend: A result of `resolve`.
      x: Real numbers `[N, *spatial, C]`; their signs are taken.
      kernel: Real numbers `[*window, C / groups, C_out]`; their signs are taken.
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: The number of channel groups.

    Returns:
      int32 `[N, *out, C_out]`.

    Raises:
      ValueError: If a filter has too many weights for the backend's sums.
    """
    numbers = BACKENDS[backend].numbers if backend in BACKENDS else None
    if numbers is not None:
        signs = (sign(a).astype(numbers.DTYPE) for a in (x, kernel))
        return numbers.conv_signs(*signs, Sums(), geometry, groups)
    packed = pack_kernel(kernel, groups)
    grouped = x.reshape(*x.shape[:-1], groups, packed.in_features)
    if not (_compiles(backend, x) and packed.whole_words):
        words = pack(backend, grouped)
        return conv_words(where, backend, words, packed, Sums(), geometry)
    _check_filter(where, packed)

    def compiled(x, kernel):
        packed = pack_kernel(kernel, groups)
        both = [operations.pack(), operations.conv(packed, Sums(), geometry)]
        return cpu.run(x, both, geometry.out, packed.out_features, jnp.int32)

    def portable(x, kernel):
        words = bits.pack_signs(x.reshape(grouped.shape))
        return xla.conv_words(words, pack_kernel(kernel, groups), Sums(), geometry)

    return choose(backend, compiled, portable, x.astype(jnp.float32), kernel)


def conv_words(
    where: str,
    backend: str,
    words: jax.Array,
    kernel: PackedKernel,
    epilogue: Epilogue,
    geometry: Geometry,
) -> jax.Array:
    """The convolution of packed signs, by the given backend.

    Args:
      where: The public function's name, for errors.
      backend: A result of `resolve`.
      words: uint32 `[N, *spatial, G, Cw]`.
      kernel: The packed kernel, of `G` groups and `Cw` words per tap.
      epilogue: Applied to the sums.
      geometry: The windows over the image.

    Returns:
      int32 or float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.

    Raises:
      ValueError: If a filter has too many weights for the backend's sums.
    """
    if words.size == 0:
        shape = (words.shape[0], *geometry.out, kernel.out_features)
        return apply_epilogue(jnp.zeros(shape, jnp.int32), epilogue)
    _check_filter(where, kernel)
    if backend != "auto":
        return BACKENDS[backend].conv_words(words, kernel, epilogue, geometry)
    runs = (partial(run, geometry=geometry) for run in (_cpu, xla.conv_words))
    return choose(backend, *runs, words, kernel, epilogue)


def real_conv(
    backend: str,
    x: jax.Array,
    kernel: jax.Array,
    epilogue: Epilogue,
    geometry: Geometry,
    groups: int,
) -> jax.Array:
    """A float32 convolution followed by an epilogue, by the given backend.

    Args:
      backend: A result of `resolve`.
      x: Images `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`.
      epilogue: Applied to the sums.
      geometry: The windows over the image.
      groups: The number of channel groups.

    Returns:
      float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.
    """

    def portable(x, kernel, epilogue):
        acc = convolution.conv(x, kernel, groups=groups, **geometry.options)
        return apply_epilogue(acc, epilogue)

    if backend not in ("auto", "cpu") or x.size == 0:
        return portable(x, kernel, epilogue)

    def compiled(x, kernel, epilogue):
        operation = operations.real_conv(kernel, epilogue, geometry)
        return _run(x, operation, epilogue, jnp.float32, geometry.out, kernel.shape[-1])

    return choose(backend, compiled, portable, x, kernel, epilogue)


def sum_pool_bits(
    backend: str, x: jax.Array, threshold: Threshold, geometry: Geometry
) -> jax.Array:
    """The thresholded sums of windows as bits, by the given backend.

    Args:
      backend: A result of `resolve`.
      x: float32 `[N, *spatial, C]`.
      threshold: Applied to the sums.
      geometry: The windows over the image.

    Returns:
      uint32 `[N, *out, ceil(C / 32)]`.
    """

    def portable(x, threshold):
        return apply_epilogue(convolution.sum_pool(x, geometry), threshold)

    if backend not in ("auto", "cpu") or x.size == 0:
        return portable(x, threshold)

    def compiled(x, threshold):
        operation = operations.sum_pool_bits(threshold, geometry)
        return _run(x, operation, threshold, jnp.float32, geometry.out, x.shape[-1])

    return choose(backend, compiled, portable, x, threshold)


def choose(backend: str, compiled: Function, portable: Function, *args: Any) -> Any:
    """Call the compiled function, or the portable one that computes the same.

    Args:
      backend: A result of `resolve`: `"auto"`, `"cpu"`, or one without compiled code.
      compiled: Calls the compiled library.
      portable: The same in JAX, for any platform.
      *args: The arguments of both.
    """
    if backend == "cpu":
        return compiled(*args)
    if backend == "auto":
        # A program for another platform must not contain the CPU call.
        return lax.platform_dependent(*args, cpu=compiled, default=portable)
    return portable(*args)


def _compiles(backend: str, x: jax.Array) -> bool:
    # float64 would be rounded to float32 first, and small values to 0.
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits <= 32
    return backend in ("auto", "cpu") and narrow and x.size > 0


def _check_filter(where: str, kernel: PackedKernel) -> None:
    weights = prod(kernel.window) * kernel.in_features
    if weights > _LARGEST_PACKED_FILTER:
        raise ValueError(
            f"{where}: expected a filter of at most {_LARGEST_PACKED_FILTER} weights, "
            f"whose sums fit into 32 bits, got {weights}"
        )


def _run(
    x: jax.Array,
    operation: operations.Operation,
    epilogue: Epilogue,
    sums: type,
    spatial: tuple[int, ...],
    features: int,
) -> jax.Array:
    dtypes = {Sums: sums, Affine: jnp.float32, Threshold: jnp.uint32}
    return cpu.run(x, [operation], spatial, features, dtypes[type(epilogue)])
