"""Data sets that a function returns as arrays."""

import functools
import sys

import numpy as np
import pytest

from xnor_jax import data, registry
from xnor_jax.data import DataError

SHAPE = (5, 7, 3)


def draw(count, classes=4, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    return images, np.arange(count) % classes


def arrays(**changed):
    train_images, train_labels = draw(40)
    test_images, test_labels = draw(9, seed=1)
    found = dict(
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )
    return lambda: tuple({**found, **changed}.values())


def test_function_of_arrays_is_loaded():
    function = arrays()
    train_images, train_labels, test_images, test_labels = function()
    found = data.load(function)
    np.testing.assert_array_equal(found.train.images, train_images)
    np.testing.assert_array_equal(found.train.labels, train_labels)
    (split,) = found.test_splits()
    np.testing.assert_array_equal(split.images, test_images)
    np.testing.assert_array_equal(split.labels, test_labels)
    assert found.train.labels.dtype == found.test.labels.dtype == np.int32
    assert found.class_names == ("0", "1", "2", "3")
    assert found.image_shape == found.source.image_shape == SHAPE
    assert (found.train_images, found.test_images) == (40, 9)
    pixels = train_images.astype(np.float64) / 255
    np.testing.assert_allclose(found.source.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(found.source.std, pixels.std((0, 1, 2)), rtol=1e-12)
    assert found.source.name == f"{__name__}:arrays.<locals>.<lambda>"


def test_source_is_named_as_in_a_recipe():
    class Images:
        def __call__(self):
            return arrays()()

    for function in (functools.partial(arrays()), Images()):
        assert data.load(function).source.name == registry.describe(function)


def test_function_that_exits_is_refused():
    with pytest.raises(DataError, match="failed: SystemExit: 3"):
        data.load(lambda: sys.exit(3))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64, np.int64])
def test_integer_dtypes_and_lists_are_accepted_as_labels(dtype):
    labels = (np.arange(40) % 4).astype(dtype)
    found = data.load(arrays(train_labels=labels, test_labels=[0, 1, 2] * 3))
    np.testing.assert_array_equal(found.train.labels, labels)


def test_constant_channel_is_not_scaled():
    images = draw(40)[0]
    images[..., 1] = 7
    found = data.load(arrays(train_images=images))
    assert found.source.std[1] == 1
    assert found.source.mean[1] == pytest.approx(7 / 255)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": draw(40)[0] / 255}, "train_images: expected uint8, got fl"),
        (
            {"test_images": draw(9)[0][..., 0]},
            r"test_images: expected shape \[N, H, W, ",
        ),
        ({"test_images": draw(9, shape=(7, 5, 3))[0]}, r"\(5, 7, 3\) as in train_im"),
        ({"train_images": draw(0)[0]}, "train_images: expected at least one pixel"),
        ({"test_images": draw(0)[0], "test_labels": []}, "test_images: expected at le"),
        ({"train_labels": np.arange(40) / 1.0}, "train_labels: expected integers, got"),
        ({"train_labels": np.ones(40, bool)}, "train_labels: expected integers, got b"),
        (
            {"train_labels": np.eye(40, dtype=int)},
            r"train_labels: expected shape \(40,",
        ),
        ({"test_labels": np.arange(8)}, r"test_labels: expected shape \(9,"),
        ({"train_labels": np.arange(40) - 1}, "train_labels: expected numbers of at l"),
        ({"test_labels": np.arange(9)}, "test_labels: expected 0 to 3 as in train_la"),
        ({"train_labels": np.zeros(40, int)}, "at least two classes, got one"),
        ({"train_labels": [[1], [1, 2]]}, "train_labels: expected an array"),
        (
            {"train_labels": np.full(40, 2**40)},
            "train_labels: expected class numbers b",
        ),
    ],
)
def test_invalid_arrays_are_named_in_one_line(changed, message):
    with pytest.raises(DataError, match=message) as error:
        data.load(arrays(**changed))
    assert "\n" not in str(error.value)


def test_failing_functions_are_one_line_errors():
    def fails():
        raise OSError("no such\nfile")

    with pytest.raises(DataError, match="fails failed: OSError: no such$"):
        data.load(fails)
    with pytest.raises(DataError, match="got 3 values"):
        data.load(lambda: arrays()()[:3])
    with pytest.raises(DataError, match="expected .train_images, .* got NoneType"):
        data.load(lambda: None)
    with pytest.raises(DataError, match="takes no data folder"):
        data.load(arrays(), "somewhere")
