"""Optax transformations for training the latent weights of a binary network.

`binop` chains the steps of the reference code (save, binarize, restore, step):

>>> import jax, optax, xnor_jax as xnor
>>> optimizer = xnor.optim.binop(optax.adam(1e-2))
>>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
>>> state = optimizer.init(params)
>>> loss = lambda params: (params["kernel"] ** 2).sum()
>>> grads = jax.grad(loss)(xnor.binarize(params))  # at the binarized tree
>>> updates, state = optimizer.update(grads, state, params)  # for the latent tree
>>> params = optax.apply_updates(params, updates)  # centred and clamped

For kernels that are stacked by `nnx.vmap`, give the mask to the transformation itself:
`optax.masked` and `optax.partition` hide the biases, which identify a stack.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from xnor_jax import rules, weights
from xnor_jax._kernel import check_kernel, check_number, wide_dtype
from xnor_jax._tree import Mask, map_kernels, map_leaves, resolve_mask
from xnor_jax.rules import Rule
from xnor_jax.weights import sign


def apply_rule(
    rule: str | Rule = "corrected",
    mask: Mask = None,
    multiplier: ArrayLike = 1.0,
) -> optax.GradientTransformation:
    """Convert gradients at the binarized tree to gradients for the latent tree.

    `update ← multiplier · rule(kernel, update)` on the masked leaves; other leaves are
    unchanged. Up to rounding, this is the gradient through `binarize` with that rule.

    Args:
      rule: A rule's name (`xnor_jax.rules`), or a function `(kernel, grad) -> grad`.
      mask: The binary kernels; None for every leaf.
      multiplier: A factor on the rule's gradient.

    Returns:
      A transformation; its `update` needs `params`, the latent tree.

    Raises:
      ValueError: If the rule is unknown; in `update`, if `params` is missing or the
        rule rejects a kernel.
      TypeError: If the multiplier is no number.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1; jiecaoyu/XNOR-Net-PyTorch, `util.py`.
    """
    function = rules.get(rule)
    check_number("apply_rule: multiplier: expected a number", multiplier)

    def latent_gradient(kernel, grad):
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
    """Keep the stored kernels centred and clamped; the last transformation of a chain.

    The update becomes `weights.project(params + update) − params`, so that
    `optax.apply_updates` stores the projected kernel.

    Args:
      mask: The binary kernels; None for every leaf.
      scale_mask: The BatchNorm scales to keep at `scale_minimum` or above. False
        selects none; `masks.norm_scales(model)` selects all, as in the reference code.
      scale_minimum: The smallest BatchNorm scale.

    Returns:
      A transformation; its `update` needs `params`, the latent tree.

    Raises:
      ValueError: In `update`, if `params` is missing, a shape differs, or a kernel has
        rank below 2 or one input channel.
      TypeError: In `update`, if a kernel is not floating point.

    References:
      Rastegari et al., XNOR-Net, 2016; jiecaoyu/XNOR-Net-PyTorch, `util.py`, `main.py`.
    """

    def centred_and_clamped(kernel, update):
        if update.shape != kernel.shape:
            raise ValueError(
                f"expected an update of the kernel's shape {kernel.shape}, got "
                f"{update.shape}"
            )
        # In a dtype no narrower than the kernel's, or rounding would shift the mean.
        dtype = jnp.promote_types(kernel.dtype, update.dtype)
        kernel, update = kernel.astype(dtype), update.astype(dtype)
        step = weights.project(kernel + update) - kernel
        # Rounding of a large step may overshoot the bound.
        short = step * (1 - float(jnp.finfo(dtype).eps))
        return jnp.where(jnp.abs(kernel + step) > 1, short, step)

    def bounded(scale, update):
        step = jnp.maximum(scale + update, scale_minimum) - scale
        # As above: rounding may undershoot the bound.
        short = step * (1 - float(jnp.finfo(step.dtype).eps))
        low = scale + step < jnp.asarray(scale_minimum, step.dtype)
        return jnp.where(low, short, step).astype(update.dtype)

    def update(updates, state, params=None):
        _require("project", params, updates)
        updates = map_kernels(
            "project", centred_and_clamped, mask, params, updates, centred=True
        )
        updates = map_leaves("project", bounded, scale_mask, params, updates)
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def binop(
    inner: optax.GradientTransformation,
    mask: Mask = None,
    rule: str | Rule = "corrected",
    multiplier: ArrayLike = 1.0,
    *,
    scale_mask: Mask = False,
    scale_minimum: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """The reference code's complete step: `chain(apply_rule, inner, project)`.

    For gradients at the binarized tree, of models without layers of `xnor_jax.nn`.
    Those layers apply the rule themselves: for them, chain only `inner` and `project`,
    or the rule would be applied twice.

    Args:
      inner: The optimizer; it receives latent gradients and the latent tree.
      mask: The binary kernels; None for every leaf.
      rule: A rule's name (`xnor_jax.rules`), or a function `(kernel, grad) -> grad`.
      multiplier: A factor on the rule's gradient.
      scale_mask: The BatchNorm scales to keep at `scale_minimum` or above. False
        selects none; `masks.norm_scales(model)` selects all, as in the reference code.
      scale_minimum: The smallest BatchNorm scale.

    Returns:
      A transformation for gradients taken at `binarize(params, mask)`.

    Raises:
      ValueError: As `apply_rule` and `project`.
      TypeError: As these, or if `inner` is no transformation.

    References:
      jiecaoyu/XNOR-Net-PyTorch, `util.py`, class `BinOp`.

    Examples:
      The published recipe, with L2 decay added to the gradient before Adam:

      >>> import optax, xnor_jax as xnor
      >>> adam = optax.chain(optax.add_decayed_weights(1e-5), optax.adam(1e-2))
      >>> optimizer = xnor.optim.binop(adam)
    """
    _check_inner("binop", inner)
    return optax.chain(
        apply_rule(rule, mask, multiplier),
        inner,
        project(mask, scale_mask=scale_mask, scale_minimum=scale_minimum),
    )


class BopState(NamedTuple):
    """State of `bop`."""

    step: jax.Array  # int32 [], steps taken
    mu: Any  # tree of the binary kernels: moving average of their gradients
    nu: Any  # the same of the squared gradients; None in the first-order form


def bop(
    gamma: optax.ScalarOrSchedule = 1e-4,
    threshold: optax.ScalarOrSchedule = 1e-8,
    *,
    sigma: optax.ScalarOrSchedule | None = None,
    epsilon: float = 1e-10,
    mask: Mask = None,
    inner: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bop, the binary optimizer: flip the signs of weights, without latent values.

    `m ← (1 − γ)·m + γ·g`; where `|m| ≥ τ` and `sign(m) = sign(w)`: `w ← −w`. The
    second-order form compares `m / (√v + ε)` with τ, where `v ← (1 − σ)·v + σ·g²`.

    The first step makes the kernels −1 or +1, so α is 1; up to rounding, if they were
    not ±1 before. Use the rule `"ste"`, which does not scale the gradient, and omit
    `project`, which would centre them. (A recipe projects the kernels after each step
    with any optimizer, so that `xnor-jax train` is Bop with centred kernels.)

    Args:
      gamma: γ in (0, 1], the rate of the gradients' moving average; or a schedule.
      threshold: τ ≥ 0, the smallest `|m|` that flips a weight, which 0 never does; or a
        schedule.
      sigma: σ in (0, 1], the rate of the squared gradients' moving average, or a
        schedule; None for the first-order form. Typical values of the second-order form
        are γ = 1e-7, σ = 1e-3 and τ = 1e-6.
      epsilon: ε of the second-order form; positive.
      mask: The binary kernels; None for every leaf.
      inner: The optimizer of all other leaves; None leaves them unchanged.

    Returns:
      A transformation; its `update` needs `params`.

    Raises:
      ValueError: If a number is out of its range; in `update`, if `params` is missing.
      TypeError: If such an argument is no number, or `inner` no transformation; in
        `init`, if a kernel is not floating point.

    References:
      Helwegen et al., Latent Weights Do Not Exist: Rethinking Binarized Neural Network
      Optimization, 2019; Suarez-Ramirez et al., A Bop and Beyond, 2021.

    Examples:
      >>> import jax.numpy as jnp, optax, xnor_jax as xnor
      >>> params = {"kernel": jnp.array([[1.0], [-1.0]]), "bias": jnp.zeros(1)}
      >>> optimizer = xnor.optim.bop(
      ...     gamma=0.1, mask={"kernel": True, "bias": False}, inner=optax.sgd(0.5)
      ... )
      >>> state = optimizer.init(params)
      >>> grads = {"kernel": jnp.array([[2.0], [2.0]]), "bias": jnp.ones(1)}
      >>> updates, state = optimizer.update(grads, state, params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[-1.],
             [-1.]], dtype=float32)
    """
    for name, value, expected, holds in (
        ("gamma", gamma, "a number in (0, 1]", lambda x: 0 < x <= 1),
        ("threshold", threshold, "a number of at least 0", lambda x: x >= 0),
        ("sigma", sigma, "a number in (0, 1]", lambda x: 0 < x <= 1),
        ("epsilon", epsilon, "a number above 0", lambda x: x > 0),
    ):
        schedule = callable(value) and name != "epsilon"
        if not schedule and not (name == "sigma" and value is None):
            check_number(f"bop: expected {name} to be {expected}", value, holds)
    if inner is not None:
        _check_inner("bop", inner)

    def init(params):
        def zeros(kernel):
            check_kernel(kernel)
            return jnp.zeros(kernel.shape, wide_dtype(kernel))

        mu = map_leaves("bop", zeros, None, params)
        nu = None if sigma is None else jax.tree.map(jnp.zeros_like, mu)
        return BopState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        _require("bop", params, updates)
        grads, step = updates, jnp.asarray(state.step)

        def at(value: Any) -> Any:
            return value(step) if callable(value) else value

        def mean(rate, power, old, grad):
            if grad.shape != old.shape:
                raise ValueError(
                    f"expected a gradient of shape {old.shape}, got {grad.shape}"
                )
            return (1 - rate) * old + rate * grad.astype(old.dtype) ** power

        def flip(kernel, first, second=None):
            ratio = first if second is None else first / (jnp.sqrt(second) + epsilon)
            # Not `sign`: its dtypes differ, and a gradient of 0 has no direction.
            same = (ratio != 0) & ((ratio >= 0) == (kernel >= 0))
            flipped = same & (jnp.abs(ratio) >= at(threshold))
            return jnp.where(flipped, -sign(kernel), sign(kernel)) - kernel

        def means(rate, power, old):
            return map_leaves("bop", partial(mean, rate, power), None, old, grads)

        mu = means(at(gamma), 1, state.mu)
        if sigma is None:
            updates, nu = jax.tree.map(flip, params, mu), None
        else:
            nu = means(at(sigma), 2, state.nu)
            updates = jax.tree.map(flip, params, mu, nu)
        return updates, BopState(jnp.asarray(optax.safe_increment(step)), mu, nu)

    binary = optax.GradientTransformation(init, update)
    if mask is None:
        return optax.with_extra_args_support(binary)
    parts: dict[Any, Any] = {True: binary, False: inner or optax.set_to_zero()}
    return optax.partition(parts, lambda params: resolve_mask("bop", mask, params))


class SignFlipsState(NamedTuple):
    """State of `count_sign_flips`."""

    # Tree of the params: float32 [] per masked kernel, MaskedNode elsewhere.
    flip_ratio: Any


def count_sign_flips(mask: Mask = None) -> optax.GradientTransformation:
    """Measure the ratio of signs that a step flips; the updates are unchanged.

    Chain it after all transformations that change the updates. Its state's `flip_ratio`
    is, for each masked kernel, the fraction in [0, 1] of weights whose sign the last
    step flipped; read it with `optax.tree.get(opt_state, "flip_ratio")`.

    Args:
      mask: The binary kernels; None for every leaf.

    Returns:
      A transformation; its `update` needs `params`, the latent tree.

    Raises:
      ValueError: In `update`, if `params` is missing, or its structure or a shape
        differs.
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
        def zero(_):
            return jnp.zeros((), jnp.float32)

        return SignFlipsState(over_kernels(zero, params))

    def ratio(kernel, update):
        if update.shape != kernel.shape:
            raise ValueError(
                "count_sign_flips: expected an update of the kernel's shape "
                f"{kernel.shape}, got {update.shape}"
            )
        flipped = sign(kernel) != sign((kernel + update).astype(kernel.dtype))
        return jnp.mean(flipped, dtype=jnp.float32)

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


def _check_inner(name: str, inner: Any) -> None:
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"{name}: expected inner to be an optax transformation, got {inner!r}"
        )
