import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax import losses

RNG = np.random.default_rng(0)
LOGITS, TEACHER = RNG.normal(size=(2, 5, 7)).astype(np.float32) * 3
LABELS = RNG.integers(0, 7, 5)


def log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.75])
def test_cross_entropy_smooths_labels(smoothing):
    smoothed = (1 - smoothing) * np.eye(7)[LABELS] + smoothing / 7
    expected = -(smoothed * log_softmax(LOGITS)).sum(-1)
    found = losses.cross_entropy(LOGITS, LABELS, smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_matches_soft_cross_entropy(temperature):
    probabilities = np.exp(log_softmax(TEACHER / temperature))
    expected = -(probabilities * log_softmax(LOGITS / temperature)).sum(-1)

    def loss(logits, teacher):
        per_example = losses.distillation(logits, teacher, temperature=temperature)
        return per_example.sum(), per_example

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    (grad, teacher_grad), per_example = gradient(
        jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    )
    np.testing.assert_allclose(per_example, temperature**2 * expected, rtol=1e-5)
    slope = np.exp(log_softmax(LOGITS / temperature)) - probabilities
    np.testing.assert_allclose(grad, temperature * slope, rtol=1e-4, atol=1e-5)
    assert not teacher_grad.any()


def test_invalid_loss_arguments_are_refused():
    with pytest.raises(ValueError, match=r"smoothing in \[0, 1\), got 1"):
        losses.cross_entropy(LOGITS, LABELS, smoothing=1.0)
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        losses.distillation(LOGITS, TEACHER, temperature=0.0)
    with pytest.raises(ValueError, match=r"teacher_logits of one shape, got \(5, 7\)"):
        losses.distillation(LOGITS, TEACHER[:, 1:])
