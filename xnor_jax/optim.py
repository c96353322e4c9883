"""Optax transformations: the reference's save, binarize, restore, step as one chain.

>>> import jax, optax, xnor_jax as xnor
>>> optimizer = xnor.optim.binop(optax.adam(1e-2))
>>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
>>> state = optimizer.init(params)
>>> loss = lambda params: (params["kernel"] ** 2).sum()
>>> grads = jax.grad(loss)(xnor.binarize(params))  # at the binarized tree
>>> updates, state = optimizer.update(grads, state, params)  # for the latent tree
>>> params = optax.apply_updates(params, updates)  # centred and clamped
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from xnor_jax import rules, weights
from xnor_jax._kernel import check_kernel
from xnor_jax._tree import Mask, map_kernels, resolve_mask
from xnor_jax.rules import Rule
from xnor_jax.weights import sign


def apply_rule(
    rule: str | Rule = "corrected",
    mask: Mask = None,
    multiplier: chex.Numeric = 1.0,
) -> optax.GradientTransformation:
    """Turn gradients at the binarized tree into gradients for the latent tree.

    `update ← multiplier · rule(kernel, update)` on the masked leaves; the others pass.
    The same as a gradient through `binarize` with that rule, to rounding.

    Args:
      rule: A name of `xnor_jax.rules`, or a function `(kernel, grad) -> grad`.
      mask: The binary kernels; None for every leaf.
      multiplier: A factor on the rule's gradient.

    Returns:
      A transformation; its `update` needs `params`, the latent tree.

    Raises:
      ValueError: For an unknown rule; in `update`, without `params` or for a kernel
        that the rule refuses.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1; jiecaoyu/XNOR-Net-PyTorch, `util.py`.
    """
    function = rules.get(rule)

    def latent_gradient(kernel, grad):
        check_kernel(kernel)
        rules.check(function, kernel)
        return rules.scaled(function, kernel, grad, multiplier).astype(grad.dtype)

    def update(updates, state, params=None):
        _require("apply_rule", params, updates)
        new = map_kernels("apply_rule", latent_gradient, mask, params, updates)
        return new, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def project(
    mask: Mask = None, *, scale_mask: Mask = False, scale_minimum: float = 0.01
) -> optax.GradientTransformation:
    """Keep the stored kernels centred and clamped: the last link of a chain.

    The update becomes `weights.project(params + update) − params`, so that
    `optax.apply_updates` stores the projected kernel.

    Args:
      mask: The binary kernels; None for every leaf.
      scale_mask: The BatchNorm scales to keep at `scale_minimum` or above, as the
        reference does: `masks.norm_scales(model)`. None are by default.
      scale_minimum: The smallest BatchNorm scale.

    Returns:
      A transformation; its `update` needs `params`, the latent tree.

    References:
      Rastegari et al., XNOR-Net, 2016; jiecaoyu/XNOR-Net-PyTorch, `util.py`, `main.py`.
    """

    def centred_and_clamped(kernel, update):
        check_kernel(kernel, centred=True)
        if update.shape != kernel.shape:
            raise ValueError(
                f"expected an update of the kernel's shape {kernel.shape}, got "
                f"{update.shape}"
            )
        # Not narrower than the kernel: a rounded step would leave it off centre.
        dtype = jnp.promote_types(kernel.dtype, update.dtype)
        kernel, update = kernel.astype(dtype), update.astype(dtype)
        step = weights.project(kernel + update) - kernel
        # Far from 0 the step is rounded, and may overshoot the bound.
        short = step * (1 - float(jnp.finfo(dtype).eps))
        return jnp.where(jnp.abs(kernel + step) > 1, short, step)

    def bounded(scale, update):
        step = jnp.maximum(scale + update, scale_minimum) - scale
        # As above: a rounded step may land below the bound.
        short = step * (1 - float(jnp.finfo(step.dtype).eps))
        low = scale + step < jnp.asarray(scale_minimum, step.dtype)
        return jnp.where(low, short, step).astype(update.dtype)

    def update(updates, state, params=None):
        _require("project", params, updates)
        updates = map_kernels("project", centred_and_clamped, mask, params, updates)
        updates = map_kernels("project", bounded, scale_mask, params, updates)
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def binop(
    inner: optax.GradientTransformation,
    mask: Mask = None,
    rule: str | Rule = "corrected",
    multiplier: chex.Numeric = 1.0,
    *,
    scale_mask: Mask = False,
    scale_minimum: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """The reference's whole step: `chain(apply_rule, inner, project)`.

    For gradients at the binarized tree, of models that know nothing of this library.
    The layers of `xnor_jax.nn` apply the rule themselves: for them, chain `inner` and
    `project`, or the rule would be applied twice.

    Args:
      inner: The optimizer, which sees latent gradients and the latent tree.
      mask: The binary kernels; None for every leaf.
      rule: A name of `xnor_jax.rules`, or a function `(kernel, grad) -> grad`.
      multiplier: A factor on the rule's gradient.
      scale_mask: The BatchNorm scales to keep at `scale_minimum` or above, as the
        reference does: `masks.norm_scales(model)`. None are by default.
      scale_minimum: The smallest BatchNorm scale.

    Returns:
      A transformation for gradients taken at `binarize(params, mask)`.

    References:
      jiecaoyu/XNOR-Net-PyTorch, `util.py`, class `BinOp`.

    Examples:
      The published recipe, its L2 decay added to the gradient before Adam:

      >>> import optax, xnor_jax as xnor
      >>> adam = optax.chain(optax.add_decayed_weights(1e-5), optax.adam(1e-2))
      >>> optimizer = xnor.optim.binop(adam)
    """
    return optax.chain(
        apply_rule(rule, mask, multiplier),
        inner,
        project(mask, scale_mask=scale_mask, scale_minimum=scale_minimum),
    )


class SignFlipsState(NamedTuple):
    """State of `count_sign_flips`."""

    # The tree of the params: float32 [] per masked kernel, MaskedNode elsewhere.
    flip_ratio: Any


def count_sign_flips(mask: Mask = None) -> optax.GradientTransformation:
    """Count the signs that a step turns, and leave the updates alone.

    Put it behind everything that changes the updates. Its state's `flip_ratio` holds,
    per masked kernel, the share in [0, 1] of the weights whose sign the last step
    turned; read it with `optax.tree.get(opt_state, "flip_ratio")`.

    Args:
      mask: The binary kernels; None for every leaf.

    Returns:
      A transformation; its `update` needs `params`, the latent tree.
    """

    def over_kernels(fn, params, *rest):
        chosen = resolve_mask("count_sign_flips", mask, params)
        return jax.tree.map(
            lambda m, *leaves: fn(*leaves) if m else optax.MaskedNode(),
            chosen,
            params,
            *rest,
        )

    def init(params):
        zero = lambda _: jnp.zeros((), jnp.float32)  # noqa: E731
        return SignFlipsState(over_kernels(zero, params))

    def ratio(kernel, update):
        turned = sign(kernel) != sign((kernel + update).astype(kernel.dtype))
        return jnp.mean(turned, dtype=jnp.float32)

    def update(updates, state, params=None):
        del state
        _require("count_sign_flips", params, updates)
        return updates, SignFlipsState(over_kernels(ratio, params, updates))

    return optax.GradientTransformation(init, update)


def _require(who: str, params: Any, updates: Any) -> None:
    if params is not None:
        return
    leaves = jax.tree.leaves_with_path(updates)
    first = f" (the first is {jax.tree_util.keystr(leaves[0][0])})" if leaves else ""
    raise ValueError(
        f"{who}: update needs the latent params of its {len(leaves)} leaves{first}; "
        "call update(updates, state, params)"
    )
