r"""Gradient rules: from the binarized kernel's gradient to the latent kernel's.

Notation, for one filter (all weights that feed one output channel):
`w` the latent kernel, `s = sign(w)`, `α = mean |w|`, `g` the loss's gradient at
`α·s`, `n` the filter's number of weights, `1[·]` an indicator. A kernel has the shape
`[..., C_in, C_out]`, so `n = kernel.size / C_out`; with groups, `C_in` is one group's.

A rule is a function `(kernel, grad) -> grad`. It receives both arrays in float32 or
wider, and its result is cast to the gradient's dtype. A custom function can be passed
wherever a rule's name is accepted:

>>> import jax.numpy as jnp, xnor_jax as xnor
>>> def tanh_rule(kernel, grad):
...     return grad * (1 - jnp.tanh(kernel) ** 2)
>>> xnor.binarize(jnp.array([[0.5], [-1.5]]), rule=tanh_rule)
Array([[ 1.],
       [-1.]], dtype=float32)

Adam's update depends on the factor `(1 − 1/C_in)·n` of `corrected` and `paper` only
through its ε and through an L2 decay that is added to the gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xnor_jax._gradient import transform_gradient
from xnor_jax._kernel import (
    check_kernel,
    check_number,
    filter_size,
    scale,
    sign,
    wide_dtype,
)
from xnor_jax.registry import RULES, find

Rule = Callable[[jax.Array, jax.Array], jax.Array]


def corrected(kernel: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""The rule of the public PyTorch code: `exact(w, g) · (1 − 1/C_in) · n`.

    `(α·1[|w| ≤ 1]·g + s·mean(s·g)) · (1 − 1/C_in) · n`. The factor `1 − 1/C_in` is the
    diagonal of the centring's Jacobian `I − 11ᵀ/C_in`.

    Args:
      kernel: The latent kernel, `[..., C_in, C_out]`, floating, `C_in ≥ 2`.
      grad: The loss's gradient at `binarize(kernel)`, of the same shape.

    Returns:
      The gradient for the latent kernel, in the dtype of `grad`.

    Raises:
      ValueError: If the shapes differ, or `C_in` is 1: the factor, and with it the
        gradient, would be 0.
      TypeError: If kernel or gradient are not floating point.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1; jiecaoyu/XNOR-Net-PyTorch, `util.py`.
    """
    w, g = _wide(kernel, grad)
    return (_chain_rule(w, g) * _centring(w)).astype(jnp.result_type(grad))


def paper(kernel: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""The rule of the paper's §3.1: `g · (α·1[|w| < 1] + 1/n) · (1 − 1/C_in) · n`.

    Args:
      kernel: The latent kernel, `[..., C_in, C_out]`, floating, `C_in ≥ 2`.
      grad: The loss's gradient at `binarize(kernel)`, of the same shape.

    Returns:
      The gradient for the latent kernel, in the dtype of `grad`.

    Raises:
      ValueError: If the shapes differ, or `C_in` is 1: the factor, and with it the
        gradient, would be 0.
      TypeError: If kernel or gradient are not floating point.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1; allenai/XNOR-Net.
    """
    w, g = _wide(kernel, grad)
    inside = jnp.abs(w) < 1
    update = g * (jnp.where(inside, scale(w), 0) + 1 / filter_size(w)) * _centring(w)
    return update.astype(jnp.result_type(grad))


def exact(kernel: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""The chain rule through α: `α·1[|w| ≤ 1]·g + s·mean(s·g)`.

    The sign itself uses the straight-through estimator.

    Args:
      kernel: The latent kernel, `[..., C_in, C_out]`, floating.
      grad: The loss's gradient at `binarize(kernel)`, of the same shape.

    Returns:
      The gradient for the latent kernel, in the dtype of `grad`.

    Raises:
      ValueError: If the shapes differ, or the kernel has rank below 2.
      TypeError: If one of them is not floating point.
    """
    w, g = _wide(kernel, grad)
    return _chain_rule(w, g).astype(jnp.result_type(grad))


def ste(kernel: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""Plain straight-through: `g · 1[|w| ≤ 1]`.

    Args:
      kernel: The latent kernel, `[..., C_in, C_out]`, floating.
      grad: The loss's gradient at `binarize(kernel)`, of the same shape.

    Returns:
      The gradient for the latent kernel, in the dtype of `grad`.

    Raises:
      ValueError: If the shapes differ, or the kernel has rank below 2.
      TypeError: If one of them is not floating point.

    References:
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
      2013; Hubara et al., Binarized Neural Networks, 2016.
    """
    w, g = _wide(kernel, grad)
    return jnp.where(jnp.abs(w) <= 1, g, 0).astype(jnp.result_type(grad))


def get(rule: str | Rule) -> Rule:
    """Return the rule of that name; return a function unchanged.

    Raises:
      ValueError: If no rule has that name.
      TypeError: If `rule` is neither a name nor callable.
    """
    return find("rule", rule, RULES, "a (kernel, grad) -> grad function")


def check(rule: Rule, kernel: jax.Array) -> None:
    """Trace `rule` on the kernel's shape, so that it fails in the forward pass.

    Raises:
      ValueError: If the rule rejects the kernel, or returns another shape.
    """
    spec = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    out = jax.eval_shape(rule, spec, spec)
    if getattr(out, "shape", None) != kernel.shape:
        raise ValueError(
            f"the rule must return a gradient of the kernel's shape {kernel.shape}, "
            f"got {getattr(out, 'shape', out)}"
        )


def with_rule(
    rule: str | Rule, kernel: jax.Array, multiplier: ArrayLike = 1.0
) -> jax.Array:
    """Return `kernel`; its gradient becomes `multiplier · rule(kernel, grad)`.

    Raises:
      ValueError: If the rule is unknown, rejects the kernel or returns another shape.
      TypeError: If the rule is neither a name nor callable, or the multiplier is no
        number.
    """
    function = get(rule)
    check(function, kernel)
    check_number("multiplier: expected a number", multiplier)

    def latent(kernel: jax.Array, g: jax.Array) -> jax.Array:
        return scaled(function, kernel, g, multiplier).astype(kernel.dtype)

    return transform_gradient(latent, kernel)


def scaled(
    rule: Rule, kernel: ArrayLike, grad: ArrayLike, multiplier: ArrayLike
) -> jax.Array:
    """Compute `multiplier · rule(kernel, grad)` in float32 or wider.

    The caller casts the product. In float16 the rule's gradient, or a multiplier such
    as 1e9, may overflow although the product does not.
    """
    w, g = _wide(kernel, grad)
    update = rule(w, g).astype(g.dtype)
    return update * jnp.asarray(multiplier).astype(g.dtype)


def _wide(kernel: ArrayLike, grad: ArrayLike) -> tuple[jax.Array, jax.Array]:
    w, g = jnp.asarray(kernel), jnp.asarray(grad)
    check_kernel(w)
    if not jnp.issubdtype(g.dtype, jnp.floating):
        raise TypeError(f"expected a floating point gradient, got {g.dtype}")
    if w.shape != g.shape:
        raise ValueError(
            f"expected kernel and grad of one shape, got {w.shape} and {g.shape}"
        )
    dtype = jnp.promote_types(wide_dtype(w), wide_dtype(g))
    return w.astype(dtype), g.astype(dtype)


def _chain_rule(w: jax.Array, g: jax.Array) -> jax.Array:
    s, inside = sign(w), jnp.abs(w) <= 1
    through_alpha = s * jnp.mean(s * g, axis=tuple(range(w.ndim - 1)))
    return jnp.where(inside, scale(w) * g, 0) + through_alpha


def _centring(w: jax.Array) -> float:
    if w.shape[-2] < 2:
        raise ValueError(
            f"expected at least 2 input channels, got a kernel of shape {w.shape}; the "
            'rule\'s factor 1 − 1/C_in would be 0: use rule="exact" for a depthwise '
            "kernel"
        )
    return (1 - 1 / w.shape[-2]) * filter_size(w)
