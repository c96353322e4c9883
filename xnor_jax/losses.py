"""Losses of a training step, one number an example."""

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike


def cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, smoothing: float = 0.0
) -> jax.Array:
    r"""The cross-entropy with labels that are smoothed: `−Σ_c q_c · log softmax(z)_c`.

    `q = (1 − s) · onehot(label) + s / classes`.

    Args:
      logits: z, floating `[..., classes]`.
      labels: Integers `[...]` in [0, classes).
      smoothing: s in [0, 1), the share of a label that all classes share.

    Returns:
      The losses `[...]`.

    Raises:
      ValueError: If s is known and out of its range.

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
    r"""The distance to a teacher's answers: `−T² · Σ_c p_c · log softmax(z/T)_c`.

    `p = softmax(teacher_logits / T)`, to which no gradient goes. It is the
    Kullback-Leibler divergence of the two and a constant, the teacher's entropy.

    Args:
      logits: z, floating `[..., classes]`.
      teacher_logits: The same shape.
      temperature: T, above 0. `T²` keeps the size of the gradient.

    Returns:
      The losses `[...]`.

    Raises:
      ValueError: If the shapes differ, or T is known and not above 0.

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Liu et al.,
      ReActNet, 2020, §4.3, which has T = 1 and no labels.
    """
    logits, teacher_logits = jnp.asarray(logits), jnp.asarray(teacher_logits)
    if logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation: expected logits of one shape, got {logits.shape} and "
            f"{teacher_logits.shape} of the teacher"
        )
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(
            f"distillation: expected a temperature above 0, got {temperature}"
        )
    answers = jax.nn.softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    return temperature**2 * optax.softmax_cross_entropy(logits / temperature, answers)
