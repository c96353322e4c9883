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
def test_cross_entropy_is_that_of_smoothed_labels(smoothing):
    wanted = (1 - smoothing) * np.eye(7)[LABELS] + smoothing / 7
    expected = -(wanted * log_softmax(LOGITS)).sum(-1)
    found = losses.cross_entropy(LOGITS, LABELS, smoothing=smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_distance_to_the_teachers_answers(temperature):
    answers = np.exp(log_softmax(TEACHER / temperature))
    expected = -(answers * log_softmax(LOGITS / temperature)).sum(-1)

    def loss(logits, teacher):
        each = losses.distillation(logits, teacher, temperature=temperature)
        return each.sum(), each

    gradient = jax.grad(loss, (0, 1), has_aux=True)
    (grad, of_teacher), each = gradient(jnp.asarray(LOGITS), jnp.asarray(TEACHER))
    np.testing.assert_allclose(each, temperature**2 * expected, rtol=1e-5)
    slope = np.exp(log_softmax(LOGITS / temperature)) - answers
    np.testing.assert_allclose(grad, temperature * slope, rtol=1e-4, atol=1e-5)
    assert not of_teacher.any()


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"smoothing in \[0, 1\), got 1"):
        losses.cross_entropy(LOGITS, LABELS, smoothing=1.0)
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        losses.distillation(LOGITS, TEACHER, temperature=0.0)
    with pytest.raises(ValueError, match=r"teacher_logits of one shape, got \(5, 7\)"):
        losses.distillation(LOGITS, TEACHER[:, 1:])
