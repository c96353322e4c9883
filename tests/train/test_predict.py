import dataclasses

import numpy as np
import packed_networks
import pytest
from flax import nnx

import xnor_jax as xnor
from xnor_jax import data
from xnor_jax.packing import Info, Preprocessing
from xnor_jax.train import predict

INFO = Info("net", Preprocessing((0.1,), (0.5,)), ("a", "b", "c"))


@pytest.fixture(scope="module")
def packed():
    packed = xnor.pack(packed_networks.randomized(nnx.eval_shape(packed_networks.tiny)))
    return dataclasses.replace(packed, info=INFO)


@pytest.fixture
def pixels():
    shape = (23, 6, 5, 1)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def expected_logits(packed, pixels):
    return np.asarray(packed(((pixels / 255 - 0.1) / 0.5).astype(np.float32)))


@pytest.mark.parametrize("count", [0, 1, 10, 23])
def test_batched_logits_match_a_single_call(packed, pixels, count, monkeypatch):
    monkeypatch.setattr(predict, "BATCH_SIZE", 10)
    found = predict.logits(packed, pixels[:count])
    assert found.shape == (count, 3) and found.dtype == np.float32
    np.testing.assert_allclose(
        found, expected_logits(packed, pixels)[:count], rtol=1e-4, atol=1e-4
    )


def test_classify_returns_classes_and_probabilities(packed, pixels):
    logits = expected_logits(packed, pixels).astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = predict.classify(packed, pixels, top=2)
    order = np.argsort(-logits, -1)[:, :2]
    names = [[name for name, _ in two] for two in found]
    assert names == [["abc"[i] for i in best] for best in order]
    probabilities = [[p for _, p in two] for two in found]
    wanted = np.take_along_axis(softmax, order, -1)
    np.testing.assert_allclose(probabilities, wanted, rtol=1e-4)
    assert predict.classify(packed, pixels) == [[best] for best, _ in found]
    assert len(predict.classify(packed, pixels, top=9)[0]) == 3
    nameless = dataclasses.replace(INFO, class_names=())
    numbers = predict.classify(dataclasses.replace(packed, info=nameless), pixels)
    assert [one.name for (one,) in numbers] == [str(b) for b in logits.argmax(-1)]


def test_evaluate_returns_loss_and_accuracy(packed, pixels):
    logits = expected_logits(packed, pixels).astype(np.float64)
    labels = np.arange(23, dtype=np.int32) % 3
    split = data.Split(pixels, labels)
    source = data.SOURCES["mnist"]
    dataset = data.Dataset(split, split, ("a", "b", "c"), source)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    loss, accuracy = predict.evaluate(packed, dataset)
    np.testing.assert_allclose(
        loss, -np.log(softmax[np.arange(23), labels]).mean(), rtol=1e-4
    )
    assert accuracy == (logits.argmax(-1) == labels).mean()
    other = dataclasses.replace(dataset, class_names=("a", "b", "d", "e"))
    with pytest.raises(data.DataError, match="the classes a, b, c, .* a, b, d, …"):
        predict.evaluate(packed, other)
    many = tuple(map(str, range(9)))
    swapped = dataclasses.replace(dataset, class_names=(*many[:6], "x", *many[7:]))
    with pytest.raises(data.DataError, match="…, 4, 5, 6, …, the .* …, 4, 5, x, …;"):
        predict.check_classes(many, swapped)
    nameless = dataclasses.replace(packed, info=Info(None, INFO.preprocessing))
    assert predict.evaluate(nameless, dataset) == (loss, accuracy)
    with pytest.raises(data.DataError, match="3 classes, the data set has 4"):
        predict.evaluate(nameless, other)


def test_wrong_shape_or_missing_preprocessing_is_refused(packed, pixels):
    with pytest.raises(data.DataError, match=r"shape \(6, 5, 1\), got \(5, 5"):
        predict.logits(packed, pixels[:, :5])
    without_preprocessing = dataclasses.replace(packed, info=Info())
    with pytest.raises(data.DataError, match="the network has no preprocessing"):
        predict.logits(without_preprocessing, pixels)


def test_dataset_name_is_read_from_the_file():
    for name in data.SOURCES:
        assert predict.dataset_name(Info(dataset=name)) == name
    mnist = data.SOURCES["mnist"]
    unnamed = Info(preprocessing=Preprocessing(mnist.mean, mnist.std))
    with pytest.raises(data.DataError, match="not name its data set; pack its run ag"):
        predict.dataset_name(unnamed)
    with pytest.raises(data.DataError, match="trained on my.sets:birds, which is not"):
        predict.dataset_name(Info(dataset="my.sets:birds"))
