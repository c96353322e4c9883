r"""The weights of an XNOR-Network: mean-centre, clamp, binarize.

Latent weights are stored in a pytree; `binarize` is a pure function of it. A kernel has
the shape `[..., C_in, C_out]`; a filter is all weights that feed one output channel,
`n = kernel.size / C_out` of them. Every function takes a pytree (a bare array is one)
and an optional mask: a bool tree, a prefix of one, or a callable, as in optax. Leaves
outside the mask are returned unchanged.

A kernel beside a bias `[*stack, C_out]`, as `nnx.vmap` creates it, is a stack of
kernels, each with its own scale. A kernel whose bias or path shows another layout, such
as an attention layer's, is rejected. The leading axes of a bare array are taken to be
spatial: for a stack, use `jax.vmap(binarize)`.

The scale α is a mean because it minimizes the squared error. For signs `B ∈ {−1, +1}ⁿ`
and a scale `α ≥ 0`, `‖w − αB‖² = ‖w‖² − 2α·⟨w, B⟩ + α²n`. For every α the middle term
is smallest where `⟨w, B⟩` is largest, so `B = sign(w)` and `⟨w, B⟩ = ‖w‖₁`; the
remaining parabola in α has its minimum at `α = ‖w‖₁/n`, the mean of the magnitudes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xnor_jax import rules
from xnor_jax._kernel import check_number, gathered, scale, sign, wide_dtype
from xnor_jax._tree import Mask, map_kernels
from xnor_jax.registry import WEIGHT_METHODS, find
from xnor_jax.rules import Rule

# Maps a latent kernel to the kernel that is binarized.
WeightMethod = Callable[[jax.Array], jax.Array]


def mean_center(params: Any, mask: Mask = None) -> Any:
    """Subtract the mean over the input channels: `w − mean(w, axis=−2)`.

    The mean is taken separately for each spatial position and output channel.

    Args:
      params: A pytree whose masked leaves are kernels `[..., C_in, C_out]`.
      mask: The kernels to centre; None for every leaf.

    Returns:
      The same tree, with the same dtypes.

    Raises:
      ValueError: If a kernel has rank below 2 or one input channel.
      TypeError: If a kernel is not floating point.

    References:
      Rastegari et al., XNOR-Net, 2016; jiecaoyu/XNOR-Net-PyTorch, `util.py`.
    """
    return map_kernels("mean_center", _mean_center, mask, params, centred=True)


def clamp(params: Any, mask: Mask = None, bound: float = 1.0) -> Any:
    """Clip each weight to `[−bound, bound]`.

    Args:
      params: A pytree whose masked leaves are kernels `[..., C_in, C_out]`.
      mask: The kernels to clamp; None for every leaf.
      bound: The largest magnitude; positive.

    Returns:
      The same tree, with the same dtypes.

    Raises:
      ValueError: If a kernel has rank below 2, or the bound is not positive.
      TypeError: If a kernel is not floating point, or the bound no number.
    """
    check_number("clamp: expected a bound above 0", bound, lambda b: b > 0)
    return map_kernels("clamp", partial(_clamp, bound=bound), mask, params)


def project(params: Any, mask: Mask = None) -> Any:
    """Centre, then clamp: `clamp(mean_center(params))`, as stored by the optimizer.

    Clamping shifts the mean, so the projection is not idempotent.

    Args:
      params: A pytree whose masked leaves are kernels `[..., C_in, C_out]`.
      mask: The kernels to project; None for every leaf.

    Returns:
      The same tree, with the same dtypes.

    Raises:
      ValueError: If a kernel has rank below 2 or one input channel.
      TypeError: If a kernel is not floating point.
    """

    def centre_and_clamp(w):
        return _clamp(_mean_center(w))

    return map_kernels("project", centre_and_clamp, mask, params, centred=True)


def latent(params: Any) -> Any:
    """Return the latent kernels unchanged: the default weight method."""
    return params


def libra(params: Any, mask: Mask = None) -> Any:
    r"""IR-Net's weights: balanced, standardized, with a power of two as scale.

    `ŵ = (w − mean(w)) / std(w)` for each filter, so that about half of its signs are
    +1; then `ŵ · 2^s / mean |ŵ|`, where `s = round(log₂ mean |ŵ|)`. `binarize` maps
    these to `2^s · sign(ŵ)`. The factor receives no gradient. A filter whose weights
    are all equal becomes 0.

    Args:
      params: A pytree whose masked leaves are latent kernels `[..., C_in, C_out]`.
      mask: The kernels to map; None for every leaf.

    Returns:
      The same tree, with the same dtypes.

    Raises:
      ValueError: If a kernel has rank below 2.
      TypeError: If a kernel is not floating point.

    References:
      Qin et al., Forward and Backward Information Retention for Accurate Binary Neural
      Networks (IR-Net), 2020, §3.2, Libra Parameter Binarization.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> xnor.binarize(xnor.weights.libra(jnp.array([[3.0], [5.0]])))
      Array([[-1.],
             [ 1.]], dtype=float32)
    """
    return map_kernels("libra", _libra, mask, params)


def recu(params: Any, mask: Mask = None, tau: ArrayLike = 0.99) -> Any:
    r"""ReCU's rectified clamp: clip a layer's weights to two of its quantiles.

    `max(min(w, Q(τ)), Q(1 − τ))`, where `Q(τ)` is the layer's τ-quantile. The quantiles
    receive no gradient. Training raises τ from 0.85 to 0.99.

    Args:
      params: A pytree whose masked leaves are latent kernels `[..., C_in, C_out]`.
      mask: The kernels to clamp; None for every leaf.
      tau: τ in (0.5, 1]; may be traced.

    Returns:
      The same tree, with the same dtypes.

    Raises:
      ValueError: If a kernel has rank below 2, or τ is concrete and out of range.
      TypeError: If a kernel is not floating point, or τ no number.

    References:
      Xu et al., ReCU: Reviving the Dead Weights in Binary Neural Networks, 2021, §3.2.
    """
    check_number("recu: expected tau in (0.5, 1]", tau, lambda t: 0.5 < t <= 1)
    return map_kernels("recu", partial(_recu, tau=tau), mask, params)


def binarize(
    params: Any,
    mask: Mask = None,
    rule: str | Rule = "corrected",
    multiplier: ArrayLike = 1.0,
) -> Any:
    """Binarize the latent kernels: `w̃ = α · sign(w)`.

    A pure function of the latent tree. The gradient of a loss that is computed from its
    result is `multiplier · rule(w, ∂loss/∂w̃)` at the latent tree.

    Args:
      params: A pytree whose masked leaves are latent kernels `[..., C_in, C_out]`.
      mask: The kernels to binarize; None for every leaf.
      rule: The gradient rule: `"corrected"`, `"paper"`, `"exact"`, `"ste"` (see
        `xnor_jax.rules`), or a function `(kernel, grad) -> grad`.
      multiplier: A factor on the rule's gradient, such as 1e9, which the public code
        uses for AlexNet under Adam.

    Returns:
      The same tree, with `α·sign(w)` in place of the masked kernels; dtypes are kept.

    Raises:
      ValueError: If a kernel has rank below 2, the rule's name is unknown, or the rule
        rejects the kernel (`corrected` and `paper` need two input channels).
      TypeError: If a kernel is not floating point.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> xnor.binarize(jnp.array([[0.5, -1.0], [-1.5, 2.0]]))
      Array([[ 1. , -1.5],
             [-1. ,  1.5]], dtype=float32)
    """
    function = rules.get(rule)

    def view(kernel):
        return _binarize(rules.with_rule(function, jnp.asarray(kernel), multiplier))

    return map_kernels("binarize", view, mask, params)


def get(method: str | WeightMethod) -> WeightMethod:
    """Return the weight method of that name; return a function unchanged.

    Raises:
      ValueError: If no method has that name.
      TypeError: If `method` is neither a name nor callable.
    """
    return find("weight_method", method, WEIGHT_METHODS, "a function of a kernel")


def apply_method(method: str | WeightMethod, kernel: jax.Array) -> jax.Array:
    """The kernel to binarize, `method(kernel)`.

    Raises:
      ValueError: If no method has that name, or it returns anything but one floating
        array of the kernel's shape.
      TypeError: If `method` is neither a name nor callable.
    """
    made = get(method)(kernel)
    dtype = getattr(made, "dtype", object)
    floating = jnp.issubdtype(dtype, jnp.floating)
    if not floating or made.shape != kernel.shape:
        got = type(made).__name__ if dtype is object else f"{dtype}{[*made.shape]}"
        raise ValueError(
            "weight_method: expected a function that returns a floating kernel of "
            f"shape {kernel.shape}, got {got}"
        )
    return made


@jax.custom_vjp
def _binarize(kernel: jax.Array) -> jax.Array:
    return scale(kernel) * sign(kernel)


# `rules.with_rule` maps the gradient.
_binarize.defvjp(lambda kernel: (_binarize(kernel), None), lambda _, g: (g,))


def _libra(w: jax.Array) -> jax.Array:
    w = jnp.asarray(w)
    wide = w.astype(wide_dtype(w))
    axes = tuple(range(w.ndim - 1))
    # The result does not depend on a filter's scale, but squares of tiny or huge
    # weights would leave the range of floats.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axes))
    wide = wide / _power_of_two(jnp.clip(jnp.frexp(largest)[1], -126, 127), wide.dtype)
    centred = wide - jnp.mean(wide, axes)
    variance = jnp.mean(centred**2, axes)
    # A rounded mean may differ from the value that all weights of a filter have. The
    # square root has no derivative at 0.
    flat = (jnp.max(wide, axes) == jnp.min(wide, axes)) | (variance == 0)
    standard = jnp.where(flat, 0, centred / jnp.sqrt(jnp.where(flat, 1, variance)))
    mean = jax.lax.stop_gradient(jnp.where(flat, 1, scale(standard)))
    factor = _power_of_two(jnp.round(jnp.log2(mean)), wide.dtype) / mean
    return (standard * factor).astype(w.dtype)


def _power_of_two(exponent: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # XLA's exp2 is rounded.
    return jnp.ldexp(jnp.ones((), dtype), exponent.astype(jnp.int32))


def _recu(w: jax.Array, tau: ArrayLike) -> jax.Array:
    w = jnp.asarray(w)
    wide = jax.lax.stop_gradient(gathered(w, kept=0).astype(wide_dtype(w)))
    tau = jnp.asarray(tau, wide.dtype)
    low, high = jnp.quantile(wide, jnp.stack([1 - tau, tau]))
    return jnp.clip(w, low.astype(w.dtype), high.astype(w.dtype))


def _mean_center(w: jax.Array) -> jax.Array:
    w = jnp.asarray(w)
    wide = w.astype(wide_dtype(w))
    return (wide - jnp.mean(wide, axis=-2, keepdims=True)).astype(w.dtype)


def _clamp(w: jax.Array, bound: float = 1.0) -> jax.Array:
    w = jnp.asarray(w)
    return jnp.clip(w, -bound, bound).astype(w.dtype)
