r"""The weights of an XNOR-Network: mean-centre, clamp, binarize.

Latent weights live in a pytree; binarizing is a pure view of it. A kernel has the shape
`[..., C_in, C_out]`; a filter is everything that feeds one output channel, that is
`n = kernel.size / C_out` weights. Every function takes a pytree (a bare array is one)
and an optional mask: a bool tree, a prefix of one, or a callable, as in optax. Leaves
that the mask leaves out come back untouched.

A kernel beside a bias `[*stack, C_out]`, as `nnx.vmap` makes it, is a stack of kernels
with a scale each. A kernel that its bias or its path shows to have another layout, such
as those of attention, is refused. Nothing tells the layout of a bare array: its leading
axes are spatial, and `jax.vmap(binarize)` is the call for a stack.

Why is the scale α a mean? For signs `B ∈ {−1, +1}ⁿ` and a scale `α ≥ 0`,
`‖w − αB‖² = ‖w‖² − 2α·⟨w, B⟩ + α²n`. Whatever α is, the middle term is best when
`⟨w, B⟩` is largest, so `B = sign(w)` and `⟨w, B⟩ = ‖w‖₁`; the parabola in α that is
left has its minimum at `α = ‖w‖₁/n`, the mean of the magnitudes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from xnor_jax import rules
from xnor_jax._kernel import scale, sign, wide_dtype
from xnor_jax._tree import Mask, map_kernels
from xnor_jax.rules import Rule


def mean_center(params: Any, mask: Mask = None) -> Any:
    """Subtract the mean over the input channels: `w − mean(w, axis=−2)`.

    Separately for each spatial position and output channel.

    Args:
      params: A pytree whose masked leaves are kernels `[..., C_in, C_out]`.
      mask: The kernels to centre; None for every leaf.

    Returns:
      The same tree, dtypes kept.

    Raises:
      ValueError: If a kernel has rank below 2 or one input channel.
      TypeError: If a kernel is not of floating point numbers.

    References:
      Rastegari et al., XNOR-Net, 2016; jiecaoyu/XNOR-Net-PyTorch, `util.py`.
    """
    return map_kernels("mean_center", _mean_center, mask, params, centred=True)


def clamp(params: Any, mask: Mask = None, bound: float = 1.0) -> Any:
    """Clip each weight to `[−bound, bound]`.

    Args:
      params: A pytree whose masked leaves are kernels `[..., C_in, C_out]`.
      mask: The kernels to clamp; None for every leaf.
      bound: The largest magnitude, above 0.

    Returns:
      The same tree, dtypes kept.

    Raises:
      ValueError: If a kernel has rank below 2, or the bound is not above 0.
      TypeError: If a kernel is not of floating point numbers.
    """
    if not isinstance(bound, Tracer) and not bound > 0:
        raise ValueError(f"clamp: expected a bound above 0, got {bound}")
    return map_kernels("clamp", partial(_clamp, bound=bound), mask, params)


def project(params: Any, mask: Mask = None) -> Any:
    """Centre, then clamp: `clamp(mean_center(params))`, what the optimizer stores.

    Clamping moves the mean, so projecting twice is not projecting once.

    Args:
      params: A pytree whose masked leaves are kernels `[..., C_in, C_out]`.
      mask: The kernels to project; None for every leaf.

    Returns:
      The same tree, dtypes kept.

    Raises:
      ValueError: If a kernel has rank below 2 or one input channel.
      TypeError: If a kernel is not of floating point numbers.
    """
    centre_and_clamp = lambda w: _clamp(_mean_center(w))  # noqa: E731
    return map_kernels("project", centre_and_clamp, mask, params, centred=True)


def binarize(
    params: Any,
    mask: Mask = None,
    rule: str | Rule = "corrected",
    multiplier: ArrayLike = 1.0,
) -> Any:
    """The binary view of the latent kernels: `w̃ = α · sign(w)`.

    The view is a pure function of the latent tree: compute the loss at it, and the
    gradient that arrives at the latent tree is `multiplier · rule(w, ∂loss/∂w̃)`.

    Args:
      params: A pytree whose masked leaves are latent kernels `[..., C_in, C_out]`.
      mask: The kernels to binarize; None for every leaf.
      rule: The gradient rule: `"corrected"`, `"paper"`, `"exact"`, `"ste"` (see
        `xnor_jax.rules`), or a function `(kernel, grad) -> grad`.
      multiplier: A factor on the rule's gradient, such as the 1e9 that the public codes
        use for AlexNet under Adam.

    Returns:
      The same tree with `α·sign(w)` in place of the masked kernels, dtypes kept.

    Raises:
      ValueError: If a kernel has rank below 2, the rule's name is unknown, or the rule
        refuses the kernel (`corrected` and `paper` need two input channels).
      TypeError: If a kernel is not of floating point numbers.

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
        kernel = jnp.asarray(kernel)
        rules.check(function, kernel)
        return _binarize(function, kernel, multiplier)

    return map_kernels("binarize", view, mask, params)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _binarize(rule: Rule, kernel: jax.Array, multiplier: ArrayLike) -> jax.Array:
    return scale(kernel) * sign(kernel)


def _binarize_fwd(rule, kernel, multiplier):
    return _binarize(rule, kernel, multiplier), (kernel, multiplier)


def _binarize_bwd(rule, residuals, g):
    kernel, multiplier = residuals
    update = rules.scaled(rule, kernel, g, multiplier)
    return update.astype(kernel.dtype), jnp.zeros_like(multiplier)


_binarize.defvjp(_binarize_fwd, _binarize_bwd)


def _mean_center(w: jax.Array) -> jax.Array:
    w = jnp.asarray(w)
    wide = w.astype(wide_dtype(w))
    return (wide - jnp.mean(wide, axis=-2, keepdims=True)).astype(w.dtype)


def _clamp(w: jax.Array, bound: float = 1.0) -> jax.Array:
    w = jnp.asarray(w)
    return jnp.clip(w, -bound, bound).astype(w.dtype)
