"""The residual sum, materialized in training."""

from functools import partial

import jax
import jax.numpy as jnp

from xnor_jax.ops import backends, cpu
from xnor_jax.ops._mesh import over_images


def residual_sum(
    y: jax.Array, shortcut: jax.Array, *, backend: str = "auto"
) -> jax.Array:
    """`y + shortcut`, the sum of a residual branch and its shortcut.

    Each sum of a stage is a term of the next. XLA's CPU cost model ignores this: XLA
    recomputes the whole chain, back to the stage's first layer, in every loop that
    reads one of the sums, and drops `lax.optimization_barrier` before it fuses. Under
    differentiation, the compiled library keeps the sum and its gradient in memory. The
    recomputation took a quarter of ResNet-20's training step.

    Args:
      y: Floats `[N, ...]`.
      shortcut: Floats of the same shape.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA; the
        others have no gradients.

    Returns:
      The sum, of the same shape. With the compiled library, it is differentiable once,
      in reverse mode.

    Raises:
      ValueError: If the shapes differ, or the backend is unknown or has no gradients.
      RuntimeError: If the backend is not available.
    """
    if y.shape != shortcut.shape:
        raise ValueError(
            f"residual_sum: expected two arrays of one shape, got {y.shape} and "
            f"{shortcut.shape}"
        )
    backend = backends.resolve("residual_sum", backend, gradient=True)
    specs = [jax.typeof(term).sharding.spec for term in (y, shortcut)]
    split = specs[0] != specs[1] or any(specs[0][1:])  # over more than the images
    if backend not in ("auto", "cpu") or not y.size or not y.ndim or split:
        return y + shortcut
    dtype = jnp.result_type(y, shortcut)
    terms = cpu.vary_as(y, shortcut), cpu.vary_as(shortcut, y)
    return _over_images(*(term.astype(dtype) for term in terms), backend=backend)


@over_images
def _over_images(y, shortcut, *, backend):
    return _kept_sum(backend, y, shortcut)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kept_sum(backend, y, shortcut):
    return y + shortcut


def _kept_sum_fwd(backend, y, shortcut):
    return _keep(backend, y + shortcut), None


def _kept_sum_bwd(backend, _, g):
    g = _keep(backend, g)
    return g, g


_kept_sum.defvjp(_kept_sum_fwd, _kept_sum_bwd)


def _keep(backend, x):
    return backends.choose(backend, cpu.keep, lambda x: x, x)
