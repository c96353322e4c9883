"""The `cpu` backend: C++ on words of signs, called through XLA's FFI.

One shared library serves every Python and every JAX from the oldest that is claimed: it
is built against XLA's C interface and loaded with `ctypes`. It chooses the instruction
set when it is loaded. The environment variable `XNOR_JAX_INSTRUCTION_SET` forces a
lower one (`avx512`, `avx2`, `neon`, `portable`); `XNOR_JAX_CPU_LIBRARY` names another
library, such as one built under a sanitizer.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xnor_jax.convolution import Pads
from xnor_jax.ops.epilogue import (
    Affine,
    Epilogue,
    Sums,
    Threshold,
    apply_epilogue,
)
from xnor_jax.ops.kernel import PackedKernel

LIBRARY = "libxnor_jax_cpu.so"

_TARGETS = (
    "binary_conv_sums",
    "binary_conv_affine",
    "binary_conv_threshold",
    "real_conv_sums",
    "real_conv_affine",
    "real_conv_threshold",
    "pack_bits",
    "sum_pool_bits",
)


def is_available() -> bool:
    """Whether the library was built and could be loaded."""
    return _library() is not None


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the library has for this processor, the best first."""
    library = _library()
    names = []
    while library and (name := library.xnor_jax_instruction_set(len(names))):
        names.append(name.decode())
    return tuple(names)


def instruction_set() -> str:
    """The instruction set that runs.

    Raises:
      RuntimeError: If the library was not built.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the cpu backend was not built; install with a C++ compiler")
    return library.xnor_jax_chosen().decode()


def use_instruction_set(name: str) -> None:
    """Run another instruction set from now on, compiled programs included.

    Args:
      name: One of `instruction_sets()`.

    Raises:
      ValueError: If this processor does not have it, or the library was not built.
    """
    library = _library()
    if library is None or not library.xnor_jax_choose(name.encode()):
        raise ValueError(
            f"instruction set {name!r} is not available here; expected one of "
            f"{', '.join(instruction_sets()) or 'none: the library was not built'}"
        )


def conv_words(
    words: jax.Array,
    kernel: PackedKernel,
    epilogue: Epilogue,
    *,
    strides: tuple[int, ...],
    padding: Pads,
    dilation: tuple[int, ...],
) -> jax.Array:
    """The convolution of signs on words, of rank 2, with its epilogue fused.

    Args:
      words: uint32 `[N, H, W, G, Cw]`.
      kernel: The packed kernel, of `G` groups and `Cw` words a tap.
      epilogue: What becomes of the sums.
      strides: Two.
      padding: Two pairs, 0 or more; outside taps add 0 to the sum.
      dilation: Two, of the kernel.

    Returns:
      int32 or float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.
    """
    spare = kernel.out_features // kernel.groups % 32
    if isinstance(epilogue, Threshold) and kernel.groups > 1 and spare:
        # A group's bits do not start at a word.
        way = {"strides": strides, "padding": padding, "dilation": dilation}
        return apply_epilogue(conv_words(words, kernel, Sums(), **way), epilogue)
    out = _out_shape(
        words.shape[1:3], kernel.words.shape[2:4], strides, padding, dilation
    )
    attributes = _geometry(strides, padding, dilation) | {
        "channels": np.int64(kernel.in_features),
        "out_channels": np.int64(kernel.out_features),
    }
    return _conv(
        "binary_conv",
        jnp.int32,
        (words, kernel.words),
        kernel.out_features,
        epilogue,
        out,
        attributes,
    )


def real_conv(
    x: jax.Array,
    kernel: jax.Array,
    epilogue: Epilogue,
    *,
    strides: tuple[int, ...],
    padding: Pads,
    dilation: tuple[int, ...],
) -> jax.Array:
    """A convolution of float32 numbers, of rank 2, with its epilogue fused.

    Each sum runs over the window in order, with fused multiply-adds where the processor
    has them.

    Args:
      x: float32 `[N, H, W, C]`.
      kernel: float32 `[kh, kw, C, C_out]`.
      epilogue: What becomes of the sums.
      strides: Two.
      padding: Two pairs of 0 or more zeros.
      dilation: Two, of the kernel.

    Returns:
      float32 `[N, *out, C_out]`, or uint32 `[N, *out, ceil(C_out / 32)]`.
    """
    out = _out_shape(x.shape[1:3], kernel.shape[:2], strides, padding, dilation)
    return _conv(
        "real_conv",
        jnp.float32,
        (x, kernel),
        kernel.shape[-1],
        epilogue,
        out,
        _geometry(strides, padding, dilation),
    )


def pack(x: jax.Array) -> jax.Array:
    """Words of the signs of `x`: float32 `[..., C]` to uint32 `[..., ceil(C / 32)]`."""
    matrix = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct((len(matrix), -(-x.shape[-1] // 32)), jnp.uint32)
    words = jax.ffi.ffi_call("xnor_jax_pack_bits", out, vmap_method="sequential")(
        matrix
    )
    return words.reshape(*x.shape[:-1], out.shape[-1])


def sum_pool_bits(
    x: jax.Array,
    threshold: Threshold,
    *,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: Pads,
) -> jax.Array:
    """The bits of each window's sum: float32 `[N, H, W, C]` to words.

    Args:
      x: What to sum, row by row; outside the image are zeros.
      threshold: Of float32.
      window: Two sizes.
      strides: Two.
      padding: Two pairs of 0 or more.

    Returns:
      uint32 `[N, *out, ceil(C / 32)]`.
    """
    spatial = _out_shape(x.shape[1:3], window, strides, padding, (1, 1))
    attributes = _geometry(strides, padding, (1, 1))
    del attributes["dilation"]
    attributes["window"] = np.array(window, np.int64)

    def call(x, *constants):
        shape = (x.shape[0], *spatial, -(-x.shape[-1] // 32))
        out = jax.ShapeDtypeStruct(shape, jnp.uint32)
        return jax.ffi.ffi_call("xnor_jax_sum_pool_bits", out)(
            x, *constants, **attributes
        )

    return _over_images(call)(x, threshold.threshold, threshold.flip)


def _conv(
    name: str,
    sum_dtype: Any,
    operands: tuple[jax.Array, jax.Array],
    out_features: int,
    epilogue: Epilogue,
    out: tuple[int, int],
    attributes: dict[str, Any],
) -> jax.Array:
    constants: tuple[jax.Array, ...] = ()
    kind, dtype, depth = "sums", sum_dtype, out_features
    if isinstance(epilogue, Affine):
        kind, dtype = "affine", jnp.float32
        constants = (epilogue.scale, epilogue.bias)
        attributes = attributes | {"relu": bool(epilogue.relu)}
    elif isinstance(epilogue, Threshold):
        kind, dtype, depth = "threshold", jnp.uint32, -(-out_features // 32)
        constants = (epilogue.threshold.astype(sum_dtype), epilogue.flip)

    def call(x, *rest):
        result = jax.ShapeDtypeStruct((x.shape[0], *out, depth), dtype)
        target = f"xnor_jax_{name}_{kind}"
        return jax.ffi.ffi_call(target, result)(x, *rest, **attributes)

    x, kernel = operands
    return _over_images(call)(x, kernel, *constants)


def _over_images(call):
    """Under `vmap` over the images alone, one call for all; else one after another."""
    mapped = jax.custom_batching.custom_vmap(call)

    @mapped.def_vmap
    def rule(axis_size, in_batched, x, *rest):
        if in_batched[0] and not any(in_batched[1:]):
            y = mapped(x.reshape(-1, *x.shape[2:]), *rest)
            return y.reshape(axis_size, -1, *y.shape[1:]), True

        def one(i):
            args = zip((x, *rest), in_batched, strict=True)
            return mapped(*(a[i] if batched else a for a, batched in args))

        return lax.map(one, jnp.arange(axis_size)), True

    return mapped


def _geometry(strides, padding, dilation) -> dict[str, Any]:
    return {
        "strides": np.array(strides, np.int64),
        "padding": np.array(padding, np.int64).reshape(-1),
        "dilation": np.array(dilation, np.int64),
    }


def _out_shape(spatial, window, strides, padding, dilation) -> tuple[int, int]:
    axes = zip(spatial, window, strides, padding, dilation, strict=True)
    height, width = (
        (size + sum(pads) - (k - 1) * d - 1) // s + 1 for size, k, s, pads, d in axes
    )
    return height, width


@cache
def _library() -> ctypes.CDLL | None:
    path = os.environ.get("XNOR_JAX_CPU_LIBRARY") or next(
        (str(p) for folder in __path__ if (p := Path(folder) / LIBRARY).is_file()), None
    )
    if path is None:
        return None
    library = ctypes.CDLL(path)
    library.xnor_jax_instruction_set.restype = ctypes.c_char_p
    library.xnor_jax_instruction_set.argtypes = [ctypes.c_int]
    library.xnor_jax_chosen.restype = ctypes.c_char_p
    library.xnor_jax_choose.argtypes = [ctypes.c_char_p]
    name = os.environ.get("XNOR_JAX_INSTRUCTION_SET")
    if name and not library.xnor_jax_choose(name.encode()):
        raise RuntimeError(
            f"XNOR_JAX_INSTRUCTION_SET: this processor does not have {name!r}"
        )
    for target in _TARGETS:
        jax.ffi.register_ffi_target(
            f"xnor_jax_{target}",
            jax.ffi.pycapsule(getattr(library, f"xnor_jax_{target}")),
            platform="cpu",
        )
    return library
