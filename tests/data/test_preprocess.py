"""Normalization and augmentation of batches, against NumPy."""

import jax
import numpy as np

from xnor_jax.data import SOURCES, Augment, preprocess


def draw(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_pixels_are_normalised_channel_by_channel():
    source, images = SOURCES["cifar10"], draw(5, 7, 6, 3)
    found = preprocess.normalize(source, jax.numpy.asarray(images))
    expected = (images / 255 - np.array(source.mean)) / np.array(source.std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_augmentation_moves_whole_images_and_keeps_what_stays_inside():
    images = draw(40, 16, 16, 1)
    moved = preprocess.augment(Augment(shift=2), images, jax.random.key(0))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, around in zip(np.asarray(moved), padded, strict=True):
        fits = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if (around[i : i + 16, j : j + 16] == image).all()
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 10
    flipped = preprocess.augment(Augment(flip=True), images, jax.random.key(1))
    same = (np.asarray(flipped) == images).all((1, 2, 3))
    turned = (np.asarray(flipped) == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ turned).all() and 0 < same.sum() < len(images)
