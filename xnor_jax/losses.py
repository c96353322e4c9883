"""Losses of a training step, one value per example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from xnor_jax._kernel import check_number


def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, smoothing: float = 0.0
) -> jax.Array:
    r"""The cross-entropy with smoothed labels: `−Σ_c q_c · log softmax(z)_c`.

    `q = (1 − s) · onehot(label) + s / classes`.

    Args:
      logits: z, floating `[..., classes]`.
      labels: Integers `[...]` in [0, classes).
      smoothing: s in [0, 1), the probability that is spread over all classes.

    Returns:
      The losses `[...]`.

    Raises:
      ValueError: If the shapes do not match, or s or a label is concrete and out of
        range.
      TypeError: If the logits are not floating point, the labels no integers, or s no
        number.

    References:
      Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015,
      §7.
    """
    check_number(
        "cross_entropy: expected smoothing in [0, 1)", smoothing, lambda s: 0 <= s < 1
    )
    logits, labels = _logits("cross_entropy", logits), jnp.asarray(labels)
    classes = logits.shape[-1]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"cross_entropy: expected integer labels, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"cross_entropy: expected labels of shape {logits.shape[:-1]}, got "
            f"{labels.shape}"
        )
    if not isinstance(labels, Tracer):
        numbers = np.asarray(labels)
        if wrong := numbers[(numbers < 0) | (numbers >= classes)].tolist():
            raise ValueError(
                f"cross_entropy: expected labels in [0, {classes}), got {wrong[0]}"
            )
    # Narrow integers may not hold the number of classes.
    labels = labels.astype(jnp.int32)
    if not isinstance(smoothing, Tracer) and smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hard = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(hard, smoothing))


def distillation(
    logits: ArrayLike, teacher_logits: ArrayLike, *, temperature: float = 1.0
) -> jax.Array:
    r"""The cross-entropy with a teacher: `−T² · Σ_c p_c · log softmax(z/T)_c`.

    `p = softmax(teacher_logits / T)`, which receives no gradient. Divided by `T²`, this
    is `KL(p ‖ softmax(z/T))` plus a constant, the entropy of `p`.

    Args:
      logits: z, floating `[..., classes]`.
      teacher_logits: The teacher's logits, of the same shape.
      temperature: T, positive. The factor `T²` offsets the gradient's scale of `1/T²`.

    Returns:
      The losses `[...]`.

    Raises:
      ValueError: If the shapes differ, or T is concrete and not positive.
      TypeError: If the logits are not floating point, or T no number.

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Liu et al.,
      ReActNet, 2020, §4.3, with T = 1 and no labels.
    """
    logits = _logits("distillation", logits)
    teacher_logits = _logits("distillation", teacher_logits)
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            "distillation: expected logits and teacher_logits of one shape, got "
            f"{logits.shape} and {teacher_logits.shape}"
        )
    check_number(
        "distillation: expected a temperature above 0", temperature, lambda t: t > 0
    )
    answers = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    return temperature**2 * optax.softmax_cross_entropy(logits / temperature, answers)


def _logits(name: str, logits: ArrayLike) -> jax.Array:
    logits = jnp.asarray(logits)
    if not logits.ndim or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(
            f"{name}: expected floating logits [..., classes], got {logits.dtype} of "
            f"shape {logits.shape}"
        )
    return logits
