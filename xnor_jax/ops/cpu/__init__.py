"""The `cpu` backend: C++ on words of signs, called through XLA's FFI.

One shared library works with all supported versions of Python and JAX: it is built
against XLA's C interface and loaded with `ctypes`. The instruction set is chosen at
load time. The environment variable `XNOR_JAX_INSTRUCTION_SET` forces a lower one
(`avx512`, `avx2`, `neon`, `portable`); `XNOR_JAX_CPU_LIBRARY` names another library,
such as one built with a sanitizer.
"""

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from xnor_jax import _compiled
from xnor_jax.geometry import Geometry
from xnor_jax.ops.bits import words_for
from xnor_jax.ops.cpu.operations import Operation, geometry_numbers
from xnor_jax.ops.cpu.split import split_images

RANK = 2  # spatial axes of its images

_LOCK = threading.Lock()


def is_available() -> bool:
    """Whether the library was built and could be loaded."""
    return _library() is not None


def instruction_sets() -> tuple[str, ...]:
    """The library's instruction sets that this processor supports, best first."""
    return _compiled.instruction_sets()


def instruction_set() -> str:
    """The instruction set in use.

    Raises:
      RuntimeError: If the library was not built.
    """
    return _built().xnor_jax_chosen().decode()


def use_instruction_set(name: str) -> None:
    """Switch to another instruction set, in compiled programs too.

    Args:
      name: One of `instruction_sets()`.

    Raises:
      ValueError: If this processor does not support it, or the library was not built.
    """
    library = _library()
    if library is None or not library.xnor_jax_choose(name.encode()):
        raise ValueError(
            f"instruction set {name!r} is not available here; expected one of "
            f"{', '.join(instruction_sets()) or 'none: the library was not built'}"
        )


def run(
    x: jax.Array,
    operations: Sequence[Operation],
    spatial: tuple[int, ...],
    features: int,
    dtype: Any,
) -> jax.Array:
    """Run a chain of operations in one call, each on the previous one's result.

    Args:
      x: Floats, words or bytes `[N, *spatial, depth]`, at most `RANK` spatial axes, not
        empty.
      operations: At least one.
      spatial: The result's spatial sizes.
      features: The result's channels.
      dtype: The result's dtype: float32, int32 (sums) or uint32 (words).

    Returns:
      The last operation's result, `[N, *spatial, features]`, or the words that hold it.

    Raises:
      RuntimeError: If the library was not built.
    """
    _built()
    depth = words_for(features) if dtype == jnp.uint32 else features
    if not isinstance(x.shape[0], int):
        return _EXPORT.bind(x, shape=(x.shape[0], *spatial, depth), dtype=dtype)
    flat = [number for operation in operations for number in operation.numbers]
    numbers = np.array(flat, np.int64)

    def result_of(x, *arrays):
        sizes = (*spatial, *(1,) * (RANK - len(spatial)))
        out = jax.ShapeDtypeStruct((x.shape[0], *sizes, depth), dtype)
        return jax.ffi.ffi_call("xnor_jax_run", out)(x, *arrays, operations=numbers)

    call = split_images(result_of, images=1)
    arrays = [array for operation in operations for array in operation.arrays]
    units = range(x.ndim - 1, RANK + 1)
    y = _batched_over_images(call)(jnp.expand_dims(x, units), *arrays)
    return vary_as(y.reshape(x.shape[0], *spatial, depth), x, *arrays)


def run_network(
    x: jax.Array, nodes: str, arrays: Sequence[jax.Array], shape: tuple[int, ...]
) -> jax.Array:
    """Run a packed network's graph in one call; see `xnor_jax.ops.run_network`.

    Args:
      x: float32 `[N, *image_shape]`, not empty.
      nodes: A list of nodes in JSON, as in a file.
      arrays: The nodes' arrays; the words of packed kernels.
      shape: The result's shape, without the batch axis.

    Returns:
      float32 `[N, *shape]`.

    Raises:
      RuntimeError: If the library was not built.
    """
    _built()
    if not isinstance(x.shape[0], int):
        return _EXPORT.bind(x, shape=(x.shape[0], *shape), dtype=jnp.float32)
    _register_network()
    image_shape = np.array(x.shape[1:], np.int64)

    def logits_of(x, *arrays):
        out = jax.ShapeDtypeStruct((x.shape[0], *shape), jnp.float32)
        call = jax.ffi.ffi_call("xnor_jax_network", out)
        return call(x, *arrays, image_shape=image_shape, nodes=nodes)

    call = split_images(logits_of, images=1)
    return vary_as(_batched_over_images(call)(x, *arrays), x, *arrays)


def kernel_gradient(
    x: jax.Array,
    others: jax.Array,
    gradient: jax.Array,
    shape: tuple[int, ...],
    geometry: Geometry,
) -> jax.Array:
    """The kernel gradient of a convolution: its images times the result's gradient.

    Args:
      x: Floats `[N, *spatial, C]`, or words of signs `[N, *spatial, ceil(C / 32)]`; at
        most `RANK` spatial axes, not empty.
      others: `x` again, or words of second signs: an image's values are then the means
        of two signs.
      gradient: float32 `[N, *out, C_out]`.
      shape: The kernel's shape, `[*window, C, C_out]`.
      geometry: The windows over the images; taps outside are 0.

    Returns:
      float32, of the kernel's shape.

    Raises:
      RuntimeError: If the library was not built.
    """
    _built()
    units = range(x.ndim - 1, RANK + 1)
    *window, channels, features = shape
    window += (1,) * (RANK - len(window))
    out = jax.ShapeDtypeStruct((*window, channels, features), jnp.float32)
    numbers = np.array(geometry_numbers(geometry), np.int64)

    def kernel_of(x, others, gradient):
        call = jax.ffi.ffi_call("xnor_jax_kernel_gradient", out)
        return call(x, others, gradient, way=numbers)

    call = split_images(kernel_of, images=3, summed=True)
    arrays = [jnp.expand_dims(array, units) for array in (x, others, gradient)]
    y = jax.custom_batching.sequential_vmap(call)(*arrays)
    return vary_as(y.reshape(shape), x, gradient)


def channel_sums(a: jax.Array, x: jax.Array, center: jax.Array) -> jax.Array:
    """The sums of `a` and `a · (x − center)` over all axes but the last, in one pass.

    Args:
      a: float32 `[N, ..., C]`, not empty.
      x: float32, of the same shape.
      center: float32 `[C]`.

    Returns:
      float32 `[2, C]`.

    Raises:
      RuntimeError: If the library was not built.
    """
    _built()
    out = jax.ShapeDtypeStruct((2, x.shape[-1]), jnp.float32)

    def sums_of(a, x, center):
        return jax.ffi.ffi_call("xnor_jax_channel_sums", out)(a, x, center)

    call = split_images(sums_of, images=2, summed=True)
    y = jax.custom_batching.sequential_vmap(call)(a, x, center)
    return vary_as(y, a, x, center)


def keep(x: jax.Array) -> jax.Array:
    """Keep an array in memory, so that XLA does not recompute it for its consumers.

    Args:
      x: An array `[N, ...]`.

    Returns:
      The same array.

    Raises:
      RuntimeError: If the library was not built.
    """
    _built()

    def same(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        aliases = {0: 0}
        return jax.ffi.ffi_call("xnor_jax_keep", out, input_output_aliases=aliases)(x)

    return vary_as(_batched_over_images(split_images(same, images=1))(x), x)


def vary_as(y: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Under `shard_map`, make `y` vary over the mesh axes of the other arrays too."""
    missing = _varying(*arrays) - _varying(y)
    return lax.pcast(y, tuple(missing), to="varying") if missing else y


def _varying(*arrays: jax.Array) -> frozenset[Any]:
    axes = (jax.typeof(array).manual_axis_type.varying for array in arrays)
    return frozenset().union(*axes)


def _refuse_export(*args: Any, **options: Any) -> Any:
    raise ValueError(
        "jax.export: the compiled backend does not support a symbolic batch size; use "
        'packed.with_backend("xla"), or backend="xla" of an operation and '
        'backend="float" of a layer'
    )


# A placeholder for a call with a symbolic batch. It cannot be lowered; programs for
# other platforms do not contain it.
_EXPORT = Primitive("xnor_jax_export")
_EXPORT.def_abstract_eval(lambda x, *, shape, dtype: ShapedArray(shape, dtype))
mlir.register_lowering(_EXPORT, _refuse_export)


def _batched_over_images(call):
    """Under `vmap`, one call if only the images are mapped, else sequential calls."""
    mapped = jax.custom_batching.custom_vmap(call)

    @mapped.def_vmap
    def rule(axis_size, in_batched, x, *rest):
        if axis_size == 0:
            given = zip((x, *rest), in_batched, strict=True)
            shapes = [(a.shape[1:] if b else a.shape, a.dtype) for a, b in given]
            y = jax.eval_shape(call, *(jax.ShapeDtypeStruct(*s) for s in shapes))
            return jnp.zeros((0, *y.shape), y.dtype), True
        if in_batched[0] and not any(in_batched[1:]):
            y = mapped(x.reshape(-1, *x.shape[2:]), *rest)
            return y.reshape(axis_size, -1, *y.shape[1:]), True

        def one(i):
            args = zip((x, *rest), in_batched, strict=True)
            return mapped(*(a[i] if batched else a for a, batched in args))

        return lax.map(one, jnp.arange(axis_size)), True

    return mapped


def _built() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the cpu backend was not built; install with a C++ compiler")
    return library


def _register_network() -> None:
    """Register the network's call and the type of its state, once.

    XLA needs the type first. JAX defers registrations until it has a CPU client, and
    then registers the calls first.
    """
    with _LOCK:
        _network()


@cache
def _network() -> None:
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX runs without a CPU client; no program calls it here.
        return
    library = _built()
    state: Any = {}
    for part in ("id", "info"):
        address = getattr(library, f"xnor_jax_network_{part}")
        address.restype = ctypes.c_void_p
        state[f"type_{part}"] = jax.ffi.pycapsule(address())
    jax.ffi.register_ffi_type("xnor_jax_network", state, platform="cpu")
    stages = {"instantiate": "network_instantiate", "execute": "network"}
    _register(
        "network", {stage: _capsule(library, call) for stage, call in stages.items()}
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = _compiled.load()
    if library is None:
        return None
    for call in ("run", "kernel_gradient", "channel_sums", "keep"):
        _register(call, _capsule(library, call))
    return library


def _capsule(library: ctypes.CDLL, call: str) -> Any:
    try:
        return jax.ffi.pycapsule(getattr(library, f"xnor_jax_{call}"))
    except AttributeError as error:
        raise RuntimeError(
            "xnor_jax: the compiled library is of another version; install xnor_jax "
            f"again ({error})"
        ) from error


def _register(call: str, handlers: Any) -> None:
    jax.ffi.register_ffi_target(f"xnor_jax_{call}", handlers, platform="cpu")
