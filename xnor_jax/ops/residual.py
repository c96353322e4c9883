"""The residual sum, materialized in training."""

from functools import partial

import jax
import jax.numpy as jnp

from xnor_jax.ops import backends, cpu
from xnor_jax.ops._mesh import over_images


@over_images
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
      The sum, of the same shape; differentiable in reverse mode only.

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
    dtype = jnp.result_type(y, shortcut)
    terms = cpu.vary_as(y, shortcut), cpu.vary_as(shortcut, y)
    return _residual_sum(
        backend if y.size else "xla", *(t.astype(dtype) for t in terms)
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _residual_sum(backend, y, shortcut):
    return y + shortcut


def _residual_sum_fwd(backend, y, shortcut):
    return _keep(backend, y + shortcut), None


def _residual_sum_bwd(backend, _, g):
    g = _keep(backend, g)
    return g, g


_residual_sum.defvjp(_residual_sum_fwd, _residual_sum_bwd)


def _keep(backend, x):
    return backends.choose(backend, cpu.keep, lambda x: x, x)
