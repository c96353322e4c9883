"""Losses of a training step, one value per example."""

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike


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
      ValueError: If s is concrete and out of range.

    References:
      Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2015,
      §7.
    """
    if not isinstance(smoothing, Tracer) and not 0 <= smoothing < 1:
        raise ValueError(
            f"cross_entropy: expected smoothing in [0, 1), got {smoothing}"
        )
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if not isinstance(smoothing, Tracer) and smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hard = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
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

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Liu et al.,
      ReActNet, 2020, §4.3, with T = 1 and no labels.
    """
    logits, teacher_logits = jnp.asarray(logits), jnp.asarray(teacher_logits)
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            "distillation: expected logits and teacher_logits of one shape, got "
            f"{logits.shape} and {teacher_logits.shape}"
        )
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(
            f"distillation: expected a temperature above 0, got {temperature}"
        )
    answers = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    return temperature**2 * optax.softmax_cross_entropy(logits / temperature, answers)
