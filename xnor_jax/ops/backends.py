"""Which backend computes: all give the same integers, so only speed depends on it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax import convolution
from xnor_jax.ops import bits, cpu, xla
from xnor_jax.ops import float as floats
from xnor_jax.ops._geometry import Geometry
from xnor_jax.ops.bits import WORD
from xnor_jax.ops.epilogue import Epilogue, Sums, Threshold, apply_epilogue
from xnor_jax.ops.kernel import PackedKernel

NAMES = ("float", "xla", "cpu")
Function = Callable[..., jax.Array]

_LARGEST_CPU_RANK = 2
# `n - 2 · popcount` of int32; the compiled library takes half of what that could hold.
_LARGEST_FILTER = 2**30 - 1


def available_backends() -> tuple[str, ...]:
    """The backends that can be asked for by name here.

    Returns:
      `"float"` and `"xla"`, which run on every platform, and `"cpu"` where the compiled
      library is loaded.
    """
    return NAMES if cpu.is_available() else NAMES[:2]


def resolve(where: str, backend: str, rank: int = 2) -> str:
    """The backend that a name stands for, here and now.

    Args:
      where: The public function's name, for errors.
      backend: `"auto"` or one of the names.
      rank: How many spatial axes the operation has.

    Returns:
      A name; `"auto"` where programs for a CPU take `"cpu"`, and others `"xla"`.

    Raises:
      ValueError: If there is no such backend, or it has no such rank.
      RuntimeError: If it is not available here.
    """
    if backend not in ("auto", *NAMES):
        raise ValueError(
            f"{where}: expected a backend out of 'auto', "
            f"{', '.join(map(repr, NAMES))}, got {backend!r}"
        )
    if backend == "auto":
        return "auto" if cpu.is_available() and rank <= _LARGEST_CPU_RANK else "xla"
    if backend == "cpu" and not cpu.is_available():
        raise RuntimeError(
            f"{where}: the backend 'cpu' is not available, its library was not built; "
            "install from source with a C++ compiler, or use 'auto'"
        )
    if backend == "cpu" and rank > _LARGEST_CPU_RANK:
        raise ValueError(
            f"{where}: the backend 'cpu' has 1 or 2 spatial axes, got {rank}; use "
            "'auto' or 'xla'"
        )
    return backend


def pack(backend: str, x: jax.Array) -> jax.Array:
    """Words of the signs of `x`, `[..., C]`: uint32 `[..., ceil(C / 32)]`.

    Args:
      backend: What `resolve` gave.
      x: Real numbers.
    """
    # A float64 would have to be rounded to float32 first, to 0 if it is small.
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits <= 32
    if backend not in ("auto", "cpu") or not narrow or x.size == 0:
        return bits.pack_signs(x)
    return _run(backend, cpu.pack, bits.pack_signs, x.astype(jnp.float32))


def conv_words(
    backend: str,
    words: jax.Array,
    kernel: PackedKernel,
    epilogue: Epilogue,
    geometry: Geometry,
) -> jax.Array:
    """The convolution of signs on words, by the backend.

    Args:
      backend: What `resolve` gave.
      words: uint32 `[N, *spatial, G, Cw]`.
      kernel: The packed kernel, of `G` groups and `Cw` words a tap.
      epilogue: What becomes of the sums.
      geometry: The window's way over the image.

    Returns:
      int32 or float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.

    Raises:
      ValueError: If a filter has more weights than sums of 32 bits can count.
    """
    if words.size == 0:
        shape = (words.shape[0], *geometry.out, kernel.out_features)
        return apply_epilogue(jnp.zeros(shape, jnp.int32), epilogue)
    weights = prod(geometry.window) * kernel.in_features
    if weights > _LARGEST_FILTER:
        raise ValueError(
            f"expected a filter of at most {_LARGEST_FILTER} weights, for sums of 32 "
            f"bits, got {weights}"
        )
    options = {
        "strides": geometry.strides,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
    }
    if backend == "float":
        return floats.conv_words(words, kernel, epilogue, **options)
    return _run(
        backend,
        partial(_conv_words_on_cpu, **options),
        partial(xla.conv_words, **options),
        words,
        kernel,
        epilogue,
    )


def real_conv(
    backend: str,
    x: jax.Array,
    kernel: jax.Array,
    epilogue: Epilogue,
    geometry: Geometry,
    groups: int,
) -> jax.Array:
    """A convolution of float32 numbers with an epilogue, by the backend.

    Args:
      backend: What `resolve` gave.
      x: Images `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`.
      epilogue: What becomes of the sums.
      geometry: The window's way over the image.
      groups: How many groups the channels fall into.

    Returns:
      float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.
    """
    options = {
        "strides": geometry.strides,
        "padding": geometry.padding,
        "dilation": geometry.dilation,
    }

    def plain(x, kernel, epilogue):
        acc = convolution.conv(x, kernel, groups=groups, **options)
        return apply_epilogue(acc, epilogue)

    if backend not in ("auto", "cpu") or x.size == 0:
        return plain(x, kernel, epilogue)
    compiled = partial(cpu.real_conv, **options)
    return _run(backend, compiled, plain, x, kernel, epilogue)


def sum_pool_bits(
    backend: str, x: jax.Array, threshold: Threshold, geometry: Geometry
) -> jax.Array:
    """The bits of each window's sum, by the backend.

    Args:
      backend: What `resolve` gave.
      x: float32 `[N, *spatial, C]`.
      threshold: Against which to compare the sums.
      geometry: The window's way over the image.

    Returns:
      uint32 `[N, *out, ceil(C / 32)]`.
    """
    options = {
        "window": geometry.window,
        "strides": geometry.strides,
        "padding": geometry.padding,
    }
    plain = partial(xla.sum_pool_bits, **options)
    if backend not in ("auto", "cpu") or x.size == 0:
        return plain(x, threshold)
    compiled = partial(cpu.sum_pool_bits, **options)
    return _run(backend, compiled, plain, x, threshold)


def _run(backend: str, compiled: Function, plain: Function, *args: Any) -> jax.Array:
    if backend == "cpu":
        return _call(compiled, *args)
    if backend == "auto":
        # A program for another platform must not hold the CPU call.
        return lax.platform_dependent(
            *args, cpu=partial(_call, compiled), default=plain
        )
    return plain(*args)


def _call(compiled: Function, *args: Any) -> jax.Array:
    """A call whose result varies over the mesh axes of its arguments, in shard_map."""
    y = compiled(*args)
    missing = _varying(args) - _varying(y)
    return lax.pcast(y, tuple(missing), to="varying") if missing else y


def _varying(tree: Any) -> frozenset[Any]:
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def _conv_words_on_cpu(words, kernel, epilogue, *, strides, padding, dilation):
    """The compiled convolution has two spatial axes: unit axes stand for the others."""
    missing = _LARGEST_CPU_RANK - len(strides)
    units, after = (1,) * missing, 1 + len(strides)
    words = jnp.expand_dims(words, range(after, after + missing))
    packed = jnp.expand_dims(kernel.words, range(after + 1, after + 1 + missing))
    # Its thresholds make whole words of a group: others would share one.
    each = kernel.out_features // kernel.groups
    fused = (
        not isinstance(epilogue, Threshold) or kernel.groups == 1 or each % WORD == 0
    )
    y = cpu.conv_words(
        words,
        dataclasses.replace(kernel, words=packed),
        epilogue if fused else Sums(),
        strides=(*strides, *units),
        padding=(*padding, *(((0, 0),) * missing)),
        dilation=(*dilation, *units),
    )
    y = jnp.squeeze(y, range(after, after + missing))
    return y if fused else apply_epilogue(y, epilogue)
