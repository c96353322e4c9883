"""Ordinary image files as the pixels that a network takes."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from xnor_jax.data import DataError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_MODES = {1: "L", 3: "RGB"}


class Pictures(NamedTuple):
    """Images of one size."""

    pixels: np.ndarray  # uint8 [N, H, W, C]
    notes: list[str]  # one for each file that had another size


def read(
    paths: Sequence[Path], image_shape: tuple[int, ...], *, invert: bool = False
) -> Pictures:
    """Read image files: turned upright, in grey or colour, and of the network's size.

    What is transparent becomes white. Of an animation, the first picture counts.

    Args:
      paths: Files of one of the `FORMATS`.
      image_shape: Height, width, channels: 1 for grey, 3 for colour.
      invert: Whether to swap dark and light.

    Raises:
      DataError: If the network takes no such images, or a file is no such image; the
        message names it.
    """
    if len(image_shape) != 3 or image_shape[-1] not in _MODES:
        raise DataError(
            "expected a network of images [height, width, 1 or 3], this one takes "
            f"{list(image_shape)}"
        )
    height, width, channels = image_shape
    pixels = np.empty((len(paths), *image_shape), np.uint8)
    notes = []
    for at, path in enumerate(paths):
        image = _open(path, _MODES[channels])
        if image.size != (width, height):
            before = f"{image.width}×{image.height}"
            notes.append(f"{path}: resized from {before} to {width}×{height}")
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels[at] = np.asarray(image).reshape(image_shape)
    return Pictures(255 - pixels if invert else pixels, notes)


def _open(path: Path, mode: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # A small file that unfolds to a huge picture.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return _convert(ImageOps.exif_transpose(image), mode)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} is no image; expected one of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # Pillow's decoders raise their own, of any kind
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot read the image {path}: {reason[0][:200]}") from error


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would cut off what is above 255.
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got mode {image.mode}")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
