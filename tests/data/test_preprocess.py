"""Normalization and augmentation of batches, against NumPy."""

import jax
import numpy as np

from xnor_jax.data import SOURCES, Augment, preprocess


def draw(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_pixels_are_normalized_per_channel():
    source, images = SOURCES["cifar10"], draw(5, 7, 6, 3)
    found = preprocess.normalize(source, jax.numpy.asarray(images))
    expected = (images / 255 - np.array(source.mean)) / np.array(source.std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_shift_and_flip_transform_whole_images():
    images = draw(40, 16, 16, 1)
    shifted = preprocess.augment(Augment(shift=2), images, jax.random.key(0))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for image, padded_image in zip(np.asarray(shifted), padded, strict=True):
        matches = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if (padded_image[i : i + 16, j : j + 16] == image).all()
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 10
    flipped = preprocess.augment(Augment(flip=True), images, jax.random.key(1))
    unchanged = (np.asarray(flipped) == images).all((1, 2, 3))
    mirrored = (np.asarray(flipped) == images[:, :, ::-1]).all((1, 2, 3))
    assert (unchanged ^ mirrored).all() and 0 < unchanged.sum() < len(images)


def test_mixup_mixes_pairs_and_the_larger_share_is_the_own():
    images = np.random.default_rng(0).normal(size=(6, 4, 4, 3)).astype(np.float32)
    mixed, share = preprocess.mixup(jax.numpy.asarray(images), jax.random.key(0))
    assert share.shape == (6,) and share.min() >= 0.5 and share.max() <= 1
    assert len(set(share.tolist())) == 6
    for i, (found, own) in enumerate(zip(mixed, share, strict=True)):
        expected = own * images[i] + (1 - own) * images[5 - i]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
