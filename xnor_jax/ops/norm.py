"""BatchNorm in training: its statistics and its gradient, each in one pass.

XLA's CPU programs run through a batch once for each of its sums; the compiled library
takes two at once. That was a tenth of NIN's step, too much to leave to Flax's layer.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xnor_jax.ops import backends, cpu


def batch_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    epsilon: float,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(x − μ) / √(σ² + ε) · scale + bias`, with μ and σ² of the batch.

    The gradient keeps `x` and a few numbers a channel.

    Args:
      x: float32 `[N, ..., C]`; the statistics are over all but the last axis.
      scale: γ, float32 `[C]`, or None for 1.
      bias: β, float32 `[C]`, or None for 0.
      epsilon: ε, added to the variance.
      backend: `"auto"` or `"cpu"` for the compiled library; others are XLA's.

    Returns:
      The result, of the shape of `x`; μ and σ², `[C]`, through which no gradient goes.

    References:
      Ioffe and Szegedy, Batch Normalization, 2015, Algorithm 1 and §3.
    """
    backend = backends.resolve("batch_norm", backend)
    if not cpu.is_available() or x.size == 0:
        backend = "xla"
    # As in `training.binary_product`.
    given = [array for array in (x, scale, bias) if array is not None]
    x = cpu.vary_as(x, *given)
    scale = None if scale is None else cpu.vary_as(scale, *given)
    bias = None if bias is None else cpu.vary_as(bias, *given)
    result: Any = _batch_norm(epsilon, backend, x, scale, bias)
    y, mean, variance = result
    return y, lax.stop_gradient(mean), lax.stop_gradient(variance)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_norm(epsilon, backend, x, scale, bias):
    return _batch_norm_fwd(epsilon, backend, x, scale, bias)[0]


def _batch_norm_fwd(epsilon, backend, x, scale, bias):
    count = x.size // x.shape[-1]
    mean, square = _sums(backend, x, x, jnp.zeros(x.shape[-1], x.dtype)) / count
    variance = jnp.maximum(0, square - mean**2)
    inverse = lax.rsqrt(variance + epsilon)
    y = (x - mean) * (inverse if scale is None else inverse * scale)
    y = y if bias is None else y + bias
    return (y, mean, variance), (x, mean, inverse, scale, bias)


def _batch_norm_bwd(epsilon, backend, residuals, gradients):
    x, mean, inverse, scale, bias = residuals
    g = gradients[0]  # of μ and σ² they are zeros
    count = x.size // x.shape[-1]
    sums, products = _sums(backend, g, x, mean)  # Σ g and Σ g · (x − μ)
    through_mean = sums / count
    through_variance = (x - mean) * (inverse**2 * products / count)
    factor = inverse if scale is None else inverse * scale
    d_x = factor * (g - through_mean - through_variance)
    d_scale = None if scale is None else inverse * products
    return d_x, d_scale, None if bias is None else sums


_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


def _sums(backend, a, x, center):
    def plain(a, x, center):
        axes = tuple(range(x.ndim - 1))
        return jnp.stack([a.sum(axes), (a * (x - center)).sum(axes)])

    return backends.choose(backend, cpu.channel_sums, plain, a, x, center)
