"""Kernels: checks, signs and scales."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike


def scale(kernel: ArrayLike) -> jax.Array:
    """The least-squares scale of each filter: `α = mean |w|`.

    Args:
      kernel: A kernel `[..., C_in, C_out]`.

    Returns:
      α, shape `[C_out]`, in the kernel's dtype, ≥ 0.

    Raises:
      ValueError: If the kernel has rank below 2.
      TypeError: If it is not a floating point array.

    References:
      Rastegari et al., XNOR-Net, 2016, eq. 6.
    """
    w = jnp.asarray(kernel)
    check_kernel(w)
    magnitudes = jnp.abs(gathered(w)).astype(wide_dtype(w)).reshape(-1, w.shape[-1])
    return (_sum_rows(magnitudes) * (1 / len(magnitudes))).astype(w.dtype)


def _sum_rows(x: jax.Array) -> jax.Array:
    """`Σᵢ x[i]` by repeated halving: a fixed order of additions, whatever XLA fuses.

    α is thus bitwise equal in training, in evaluation and in a packed network.
    """
    x = jnp.pad(x, ((0, (1 << (len(x) - 1).bit_length()) - len(x)), (0, 0)))
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def gathered(x: jax.Array, kept: int = 1) -> jax.Array:
    """Gather an array's axes, except the last `kept`, if an Explicit mesh shards them.

    JAX does not reshape sharded axes into one.
    """
    sharding = jax.typeof(x).sharding
    axes = x.ndim - kept
    if not any(sharding.spec[:axes]):
        return x
    spec = PartitionSpec(*[None] * axes, *sharding.spec[axes:])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def sign(x: ArrayLike) -> jax.Array:
    """The sign in {−1, +1}, with `sign(±0) = +1`: one bit has no zero.

    Args:
      x: An array of any shape, floating or integer.

    Returns:
      The signs, in the dtype and shape of `x`. Its gradient is 0: see `sign_ste`.

    Raises:
      TypeError: If `x` is boolean or complex.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> xnor.sign(jnp.array([-2.0, -0.0, 0.0, 3.0]))
      Array([-1.,  1.,  1.,  1.], dtype=float32)
    """
    x = jnp.asarray(x)
    check_real("sign", x)
    return jnp.where(x >= 0, 1, -1).astype(x.dtype)


def check_real(where: str, x: Any) -> None:
    """Check that an array is floating or integer.

    Args:
      where: The public function's name, for the error.
      x: The array.

    Raises:
      TypeError: If it has another dtype.
    """
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"{where}: expected real numbers, got {describe(x)}")


def check_kernel(kernel: Any) -> None:
    """Check that a leaf is a floating point kernel `[..., C_in, C_out]`.

    Args:
      kernel: The leaf to check.

    Raises:
      TypeError: If it is not an array of a real floating dtype.
      ValueError: If its rank is below 2, or it is empty.
    """
    dtype = getattr(kernel, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"expected a floating point kernel, got {describe(kernel)}")
    shape = tuple(kernel.shape)
    if len(shape) < 2:
        raise ValueError(
            f"expected a kernel of shape [..., C_in, C_out], got shape {shape}"
        )
    if 0 in shape:
        raise ValueError(f"expected a non-empty kernel, got shape {shape}")


def filter_size(kernel: jax.Array) -> int:
    """The number of weights per output channel, `n`."""
    return kernel.size // kernel.shape[-1]


def wide_dtype(x: jax.Array) -> Any:
    """The dtype for sums: bfloat16 stalls after 256 terms, float16 overflows."""
    # Not promote_types, which strict promotion forbids for bfloat16 and float32.
    return jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype


def describe(leaf: Any) -> str:
    """A leaf's dtype, or its type if it is not an array; for error messages."""
    return str(getattr(leaf, "dtype", type(leaf).__name__))


def check_number(
    expected: str, value: Any, holds: Callable[[Any], Any] = lambda _: True
) -> None:
    """Check an argument that is one number, unless it is traced.

    Args:
      expected: The beginning of the message, as `"clamp: expected a bound above 0"`.
      value: The argument.
      holds: Whether a number is in range.

    Raises:
      TypeError: If the value is no real number, or several.
      ValueError: If it is out of range.
    """
    if isinstance(value, Tracer):
        return
    dtype = getattr(value, "dtype", type(value))
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if np.ndim(value) or not real:
        raise TypeError(f"{expected}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{expected}, got {value}")


def summary(leaf: Any) -> str:
    """A leaf as `uint32[3,4]`, without its values; for `repr`."""
    shape = ",".join(map(str, getattr(leaf, "shape", ())))
    return f"{leaf.dtype}[{shape}]" if hasattr(leaf, "dtype") else repr(leaf)
