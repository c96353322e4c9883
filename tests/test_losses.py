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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_are_checked(smoothing):
    def loss(labels, logits=LOGITS):
        return losses.cross_entropy(logits, labels, smoothing=smoothing)

    for labels in (LABELS[:, None], LABELS[:1], 3):
        with pytest.raises(ValueError, match=r"labels of shape \(5,\), got"):
            loss(labels)
    with pytest.raises(TypeError, match="integer labels, got float32"):
        loss(LABELS.astype(np.float32))
    for labels in (LABELS * 0 + 7, LABELS * 0 - 1):
        with pytest.raises(ValueError, match=r"labels in \[0, 7\), got"):
            loss(labels)
    with pytest.raises(TypeError, match="floating logits .*, got int32 of shape"):
        loss(LABELS, LOGITS.astype(np.int32))
    # 261 has the last eight bits of 5.
    for dtype in (np.uint8, np.int8):
        found = loss(np.array([5], dtype), np.zeros((1, 300), np.float32))
        np.testing.assert_allclose(found, np.log(300), rtol=1e-5)


@pytest.mark.parametrize("value", [None, "1", np.ones(2)])
def test_a_number_that_is_none_is_named(value):
    with pytest.raises(TypeError, match="smoothing in"):
        losses.cross_entropy(LOGITS, LABELS, smoothing=value)
    with pytest.raises(TypeError, match="a temperature above 0"):
        losses.distillation(LOGITS, TEACHER, temperature=value)
