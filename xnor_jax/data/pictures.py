"""Decoding and augmenting pictures, image files of any format and size, with Pillow."""

import contextlib
import functools
import io
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xnor_jax._words import first_line
from xnor_jax.data.sets import Augment, DataError, Fit

MODES = {1: "L", 3: "RGB"}  # by number of channels

# The formats that are recognised by their first bytes.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "AVIF")
# Formats that Pillow recognises but does not decode itself; EPS runs a program.
_FOREIGN = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_GREY = ("1", "L", "LA", "La")
_opening = threading.Lock()


@functools.cache
def suffixes() -> dict[str, str]:
    """The file suffixes that Pillow decodes, each with its format."""
    return {
        suffix: name
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in _FOREIGN
    }


def read(picture: str | Path | bytes, channels: int, *, name: str) -> Image.Image:
    """Decode a picture upright, in grey or colour.

    Transparent areas become white. Only the first frame of an animation is read.

    Args:
      picture: A file that Pillow decodes, or the bytes of a file in one of `FORMATS`.
      channels: 1 for grey, 3 for colour.
      name: The picture's name, for errors.

    Raises:
      DataError: If the picture cannot be decoded; the message names it.
    """
    with _opened(picture, name) as image:
        return _convert(ImageOps.exif_transpose(image), MODES[channels])


def read_as_stored(picture: str | Path | bytes, *, name: str) -> Image.Image:
    """Decode a picture as `read` does, in grey only if it is stored in grey."""
    with _opened(picture, name) as image:
        grey = image.mode in _GREY or image.mode.startswith("I;16")
        if image.mode == "P":
            colours = np.asarray(image.convert("RGB"))
            grey = bool((colours == colours[..., :1]).all())
        return _convert(ImageOps.exif_transpose(image), MODES[1 if grey else 3])


def verify(picture: str | Path | bytes, *, name: str) -> None:
    """Check a picture for damage in a fraction of its decoding time.

    The checksums of a PNG are verified, and the end of a JPEG or WebP must be present.
    Pictures in other formats, and those whose end is not found, are decoded.

    Raises:
      DataError: If the file is not a picture or is damaged; the message names it.
    """
    with _opened(picture, name) as image:
        _check_mode(image)
        if image.format == "PNG":
            image.verify()
        elif not _has_end(image):
            image.load()


def refuse(broken: Sequence[DataError]) -> None:
    """Raise the first error, if there is one, with the number of the others."""
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise DataError(f"{broken[0]}; fix or remove it{more}") from broken[0]


def _has_end(image: Image.Image) -> bool:
    file: Any = getattr(image, "fp", None)
    if file is None or image.format not in ("JPEG", "MPO", "WEBP"):
        return False
    at = file.tell()
    size = file.seek(0, io.SEEK_END)
    if image.format == "WEBP":
        file.seek(4)
        complete = int.from_bytes(file.read(4), "little") + 8 <= size
    else:
        file.seek(size - 2)
        complete = file.read(2) == b"\xff\xd9"
    file.seek(at)
    return complete


@contextlib.contextmanager
def _opened(picture: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
    try:
        with _open(file) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name} is not an image; expected one of {', '.join(FORMATS)} or another "
            "format that Pillow decodes"
        ) from error
    except Exception as error:  # Pillow's decoders raise exceptions of any type
        raise DataError(f"cannot read the image {name}: {first_line(error)}") from error


def _open(file: str | Path | io.BytesIO) -> Image.Image:
    formats = [name for name in FORMATS if name in suffixes().values()]
    if not isinstance(file, io.BytesIO):
        formats += [suffixes().get(Path(file).suffix.lower(), "PNG")]
    # Warning filters are global to the process.
    with _opening, warnings.catch_warnings():
        # A small file can decode to a huge picture.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(file, formats=formats)


def centre(image: Image.Image, fit: Fit) -> Image.Image:
    """Resize the shorter side and crop the centre, as in evaluation.

    Args:
      image: An image of any size.
      fit: The sizes of the resized image and of the crop.

    Returns:
      The central `fit.size × fit.size` of the image with a shorter side of
      `fit.resize`.
    """
    shorter = min(image.size)
    if max(image.size) > 16 * shorter:  # resized whole, it could fill the memory
        width, height = (min(side, 16 * shorter) for side in image.size)
        image = _crop_centre(image, width, height)
    if shorter != fit.resize:
        width, height = (side * fit.resize // shorter for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return _crop_centre(image, fit.size, fit.size)


def _crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def random_box(
    width: int, height: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop, as in training on ImageNet.

    Args:
      width: The image's width, at least 1.
      height: The image's height, at least 1.
      rng: The random generator.

    Returns:
      Left, top, right and bottom of a box anywhere in the image. It has 8 to 100 % of
      the image's area and an aspect ratio from 3/4 to 4/3, up to rounding. If none of
      ten draws fits into the image, it is the largest central box of such a ratio.

    References:
      Szegedy et al., Going Deeper with Convolutions, 2015.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def augment(
    image: Image.Image, fit: Fit, how: Augment, rng: np.random.Generator
) -> np.ndarray:
    """Make a training image from a picture, with random augmentation.

    Args:
      image: An image of any size.
      fit: The sizes of the resized image and of the crop.
      how: The augmentations.
      rng: The random generator.

    Returns:
      uint8 `[fit.size, fit.size, C]`.
    """
    if how.resize_crop:
        part = image.crop(random_box(*image.size, rng))
        image = part.resize((fit.size, fit.size), Image.Resampling.BILINEAR)
    else:
        image = centre(image, fit)
    pixels = to_array(image)
    if by := how.shift:
        padded = np.pad(pixels, ((by, by), (by, by), (0, 0)))
        top, left = rng.integers(0, 2 * by + 1, 2)
        pixels = padded[top : top + fit.size, left : left + fit.size]
    if how.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels, uint8 `[H, W, C]`."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits per channel, got mode {image.mode}")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would clip values above 255.
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    _check_mode(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
