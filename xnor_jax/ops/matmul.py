"""Matrix products of signs: floats in, integers out."""

from functools import partial

import jax
from jax.typing import ArrayLike

from xnor_jax._kernel import check_kernel
from xnor_jax.geometry import DENSE
from xnor_jax.ops import _inference, backends
from xnor_jax.ops._mesh import over_images


def binary_matmul(a: ArrayLike, b: ArrayLike, *, backend: str = "auto") -> jax.Array:
    """The matrix product of signs, `sign(a) @ sign(b)`.

    All backends give identical results.

    Args:
      a: `[..., K]`, floating; its signs are taken, `sign(±0) = +1`.
      b: `[K, N]`, floating; its signs are taken.
      backend: `"auto"`, or one of `available_backends()`.

    Returns:
      int32 sums `[..., N]`.

    Raises:
      ValueError: If the shapes do not fit, or the backend is unknown.
      TypeError: If an argument is not floating point, or when differentiated: integers
        have no gradient.
      RuntimeError: If the backend is not available.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> a, b = jnp.array([[1.0, -1.0, 1.0]]), jnp.ones((3, 2))
      >>> xnor.ops.binary_matmul(a, b)
      Array([[1, 1]], dtype=int32)
    """
    a = _inference.check_floating("binary_matmul", "a", a)
    b = _inference.check_floating("binary_matmul", "b", b)
    if a.ndim < 1 or b.ndim != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"binary_matmul: expected a [..., K] and b [K, N], got {a.shape} and "
            f"{b.shape}"
        )
    try:
        check_kernel(b)
    except ValueError as error:
        raise ValueError(f"binary_matmul: {error}") from None
    backend = backends.resolve("binary_matmul", backend)
    return _binary_matmul(a, b, backend=backend)


@over_images
@partial(jax.jit, static_argnames=("backend",))
def _binary_matmul(a, b, *, backend: str) -> jax.Array:
    a, b = _inference.no_gradient("binary_matmul", (a, b))
    rows = a.reshape(-1, a.shape[-1])
    acc = backends.product("binary_matmul", backend, rows, b, DENSE)
    return acc.reshape(*a.shape[:-1], b.shape[-1])
