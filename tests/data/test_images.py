"""Image files of common formats, and files that are not images."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from xnor_jax.data import DataError, Fit, images

SHAPE = (28, 20, 1)


@pytest.fixture
def grey():
    return np.random.default_rng(0).integers(0, 256, SHAPE[:2]).astype(np.uint8)


@pytest.fixture
def read(tmp_path):
    """Save an image, or write bytes, and read the file."""

    def run(image, name="a.png", shape=SHAPE, **options):
        path = tmp_path / name
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path)
        return images.read([path], shape, **options)

    return run


def test_pixels_are_read_unchanged(read, grey):
    pixels, notes = read(Image.fromarray(grey))
    assert pixels.dtype == np.uint8 and pixels.shape == (1, *SHAPE) and not notes
    np.testing.assert_array_equal(pixels[0, ..., 0], grey)
    inverted = read(Image.fromarray(grey), invert=True).pixels
    np.testing.assert_array_equal(inverted, 255 - pixels)


@pytest.mark.parametrize("name", ["a.bmp", "a.gif", "a.tiff", "a.pgm"])
def test_other_formats(read, grey, name):
    found = read(Image.fromarray(grey), name).pixels
    np.testing.assert_array_equal(found[0, ..., 0], grey)


def test_webp(read, grey):
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(buffer, "WEBP", lossless=True)
    found = read(buffer.getvalue(), "a.webp").pixels
    np.testing.assert_array_equal(found[0, ..., 0], grey)


def test_colour_and_grey_are_converted(read, grey):
    colours = np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    pixels = read(Image.fromarray(colours), shape=(28, 20, 3)).pixels
    np.testing.assert_array_equal(pixels[0], colours)
    weighted = colours @ np.array([0.299, 0.587, 0.114])
    found = read(Image.fromarray(colours)).pixels[0, ..., 0]
    assert np.abs(found - weighted).max() <= 1
    spread = read(Image.fromarray(grey), shape=(28, 20, 3)).pixels[0]
    np.testing.assert_array_equal(spread, np.repeat(grey[..., None], 3, -1))


def test_16_bit_images_keep_the_high_8_bits(read, grey):
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    np.testing.assert_array_equal(read(deep).pixels[0, ..., 0], grey)


def test_transparent_pixels_become_white(read, grey):
    ink = np.zeros((*grey.shape, 4), np.uint8)
    ink[..., 3] = grey
    found = read(Image.fromarray(ink)).pixels[0, ..., 0]
    np.testing.assert_array_equal(found, 255 - grey)


def test_other_sizes_are_resized_with_a_note(read):
    # A picture of twice the height and five times the width, with a light left half.
    large = np.zeros((56, 100), np.uint8)
    large[:, :50] = 200
    pixels, notes = read(Image.fromarray(large))
    assert len(notes) == 1
    assert notes[0].endswith("a.png: resized from 100×56 to 20×28")
    np.testing.assert_array_equal(pixels[0, :, :8], 200)
    np.testing.assert_array_equal(pixels[0, :, 12:], 0)


def test_exif_orientation_is_applied(read, grey, tmp_path):
    sideways = Image.fromarray(np.rot90(grey).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a turn by 90° clockwise
    sideways.save(tmp_path / "b.png", exif=exif)
    for fit in (None, Fit(20, 20)):
        shape = SHAPE if fit is None else (20, 20, 1)
        pixels, notes = images.read([tmp_path / "b.png"], shape, fit=fit)
        assert not notes
        expected = grey if fit is None else grey[4:24]
        np.testing.assert_array_equal(pixels[0, ..., 0], expected)


def png_bytes(grey, tmp_path):
    path = tmp_path / "whole.png"
    Image.fromarray(grey).save(path)
    return path.read_bytes()


def test_invalid_images_are_named_in_one_line(read, grey, tmp_path, monkeypatch):
    valid = png_bytes(grey, tmp_path)
    for content, message in (
        (b"hello", "a.png is not an image; expected one of PNG, JPEG"),
        (b"", "is not an image"),
        (valid[:90], "cannot read the image .*a.png"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    ):
        with pytest.raises(DataError, match=message) as error:
            read(content)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="mode F"):
        read(Image.fromarray(grey.astype(np.float32)), "a.tiff")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="cannot read the image"):
        read(valid)


def test_damaged_bytes_are_refused_or_decoded(grey, tmp_path):
    valid = bytearray(png_bytes(grey, tmp_path))
    rng = np.random.default_rng(0)
    path = tmp_path / "b.png"
    for _ in range(200):
        content = bytearray(valid)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        try:
            assert images.read([path], SHAPE).pixels.shape == (1, *SHAPE)
        except DataError as error:
            assert str(path) in str(error)


def test_unsupported_image_shapes_are_refused():
    for shape in ((7,), (28, 28, 2), (23, 3)):
        with pytest.raises(DataError, match=re.escape(str(list(shape)))):
            images.read([], shape)
