"""BatchNorm in training: its statistics and its gradient, each in one pass.

XLA's CPU programs read a batch once per sum; the compiled library computes two sums in
one pass. This replacement of Flax's layer saves a tenth of NIN's training step.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax.ops import backends, cpu
from xnor_jax.ops._mesh import over_images


@partial(over_images, replicated=2)
def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(x − μ) / √(σ² + ε) · scale + bias`, with μ and σ² of the batch.

    The residuals are `x` and a few values per channel. Differentiable in reverse mode
    only; differentiable twice only if XLA computes it.

    Args:
      x: float32 `[N, ..., C]`; the statistics are over all but the last axis.
      scale: γ, float32 `[C]`, or None for 1.
      bias: β, float32 `[C]`, or None for 0.
      epsilon: ε, added to the variance.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA; the
        others have no gradients.

    Returns:
      The result, of the shape of `x`; μ and σ², `[C]`, which carry no gradient.

    Raises:
      ValueError: If `x` has fewer than 2 axes, or the backend has no gradients.
      RuntimeError: If the backend is not available.

    References:
      Ioffe and Szegedy, Batch Normalization, 2015, Algorithm 1 and §3.
    """
    if x.ndim < 2:
        raise ValueError(f"batch_norm: expected [N, ..., C], got shape {x.shape}")
    backend = backends.resolve("batch_norm", backend, gradient=True)
    backend = backend if x.size else "xla"
    # Broadcast to a common varying type, as in `training.binary_product`.
    given = [array for array in (x, scale, bias) if array is not None]
    x = cpu.vary_as(x, *given)
    scale = None if scale is None else cpu.vary_as(scale, *given)
    bias = None if bias is None else cpu.vary_as(bias, *given)
    result: Any = _batch_norm(float(epsilon), backend, x, scale, bias)
    y, mean, variance = result
    return y, lax.stop_gradient(mean), lax.stop_gradient(variance)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_norm(epsilon, backend, x, scale, bias):
    return _batch_norm_fwd(epsilon, backend, x, scale, bias)[0]


def _batch_norm_fwd(epsilon, backend, x, scale, bias):
    mean, square = _means(backend, x, x, jnp.zeros(x.shape[-1], x.dtype))
    variance = jnp.maximum(0, square - mean**2)
    inverse = lax.rsqrt(variance + epsilon)
    y = (x - mean) * (inverse if scale is None else inverse * scale)
    y = y if bias is None else y + bias
    return (y, mean, variance), (x, mean, variance, inverse, scale, bias)


def _batch_norm_bwd(epsilon, backend, residuals, gradients):
    x, mean, variance, inverse, scale, bias = residuals
    g = gradients[0]  # those of μ and σ² are zero
    of_g, centred = _means(backend, g, x, mean)  # means of g and g · (x − μ)
    # No gradient flows through a variance that rounding reduced to 0.
    through_variance = jnp.where(variance > 0, inverse**2 * centred, 0)
    factor = inverse if scale is None else inverse * scale
    d_x = factor * (g - of_g - (x - mean) * through_variance)
    count = _count(x)
    d_scale = None if scale is None else count * inverse * centred
    return d_x, d_scale, None if bias is None else count * of_g


_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


def _means(backend, a, x, center):
    """The means of `a` and of `a · (x − center)`, float32 `[2, C]`."""

    def portable(a, x, center):
        axes = tuple(range(x.ndim - 1))
        return jnp.stack([a.sum(axes), (a * (x - center)).sum(axes)])

    sums = backends.choose(backend, cpu.channel_sums, portable, a, x, center)
    return sums / _count(x)


def _count(x):
    count = prod(x.shape[:-1])
    return float(count) if isinstance(count, int) else count  # symbolic in `jax.export`
