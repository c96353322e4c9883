"""Crops of pictures, for training and for the test."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from folders import draw
from PIL import Image

from xnor_jax.data import Augment, Fit, pictures

SIZES = st.tuples(st.integers(1, 400), st.integers(1, 400))


def test_centre_crop_without_resize():
    image = draw(1, (41, 30))
    found = pictures.to_array(pictures.centre(image, Fit(20, 30)))
    # (41 - 20) / 2 is 10.5, which rounds to even; (30 - 20) / 2 is 5.
    np.testing.assert_array_equal(found, np.asarray(image)[5:25, 10:30])


@pytest.mark.parametrize("size", [(37, 90), (90, 37), (64, 64)])
def test_shorter_side_is_resized_with_a_triangle_filter(size):
    image, fit = draw(2, size), Fit(16, 20)
    found = pictures.to_array(pictures.centre(image, fit)).astype(np.float64)
    width, height = (side * 20 // min(size) for side in size)
    rows = triangle(size[1], height) @ np.asarray(image, np.float64).transpose(2, 0, 1)
    resized = (rows @ triangle(size[0], width).T).transpose(1, 2, 0)
    top, left = (height - 16) // 2, (width - 16) // 2
    # Pillow rounds after each of its two passes.
    expected = resized[top : top + 16, left : left + 16]
    assert abs(found - expected).max() <= 1.01


def triangle(before, after):
    """The matrix that resizes an axis: each row a triangle, two output pixels wide."""
    scale = before / after
    centres = (np.arange(after)[:, None] + 0.5) * scale
    distance = abs(np.arange(before) + 0.5 - centres) / max(scale, 1)
    weights = np.maximum(0, 1 - distance)
    return weights / weights.sum(1, keepdims=True)


@hypothesis.given(size=SIZES, seed=st.integers(0, 1000))
def test_random_box_respects_area_and_aspect_ratio(size, seed):
    width, height = size
    box = pictures.random_box(width, height, np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    # Rounding changes each side by at most a half.
    assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-9
    assert (h - 0.5) / (w + 0.5) <= 4 / 3 + 1e-9
    if max(size) <= 4 / 3 * min(size):
        assert (w + 0.5) * (h + 0.5) >= 0.08 * width * height


def test_random_boxes_cover_the_image_uniformly():
    rng = np.random.default_rng(0)
    boxes = np.array([pictures.random_box(450, 450, rng) for _ in range(4000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides.prod(1) / 450**2
    # The area is uniform, but large boxes of extreme aspect ratios do not fit.
    assert area.min() < 0.1 and area.max() > 0.95 and 0.4 < area.mean() < 0.54
    assert abs(np.log(sides[:, 0] / sides[:, 1]).mean()) < 0.01
    assert abs(boxes[:, :2] / (450 - sides + 1)).mean() == pytest.approx(0.5, abs=0.02)


def test_augment_resizes_the_random_box():
    image, rng = draw(3, (60, 50)), np.random.default_rng(4)
    box = pictures.random_box(60, 50, np.random.default_rng(4))
    found = pictures.augment(image, Fit(24, 27), Augment(resize_crop=True), rng)
    expected = image.crop(box).resize((24, 24), Image.Resampling.BILINEAR)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_shift_and_flip_give_padded_crops():
    image, fit = draw(5, (20, 20)), Fit(20, 20)
    original = np.asarray(image)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        found = pictures.augment(image, fit, Augment(shift=2, flip=True), rng)
        assert found.shape == (20, 20, 3)
        padded = np.pad(original, ((2, 2), (2, 2), (0, 0)))
        crops = {
            (top, left, mirrored): padded[top : top + 20, left : left + 20]
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
        }
        matches = [
            key
            for key, pixels in crops.items()
            if np.array_equal(pixels[:, ::-1] if key[2] else pixels, found)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 45


def test_fit_refuses_a_crop_above_the_resize():
    with pytest.raises(ValueError, match="got 30 and 20"):
        Fit(30, 20)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_very_long_image_is_cropped_before_it_is_resized(size):
    image = Image.new("L", size)
    image.paste(200, (0, 0, *(max(1, side // 3) for side in size)))
    found = np.asarray(pictures.centre(image, Fit(224, 224)))
    assert found.shape == (224, 224) and not found.any()
