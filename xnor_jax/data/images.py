"""Ordinary image files as the pixels that a network takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from xnor_jax.data import pictures
from xnor_jax.data.sets import DataError, Fit


class Pixels(NamedTuple):
    """Images of one size."""

    pixels: np.ndarray  # uint8 [N, H, W, C]
    notes: list[str]  # one for each file that was stretched to another size


def read(
    paths: Sequence[Path | bytes],
    image_shape: tuple[int, ...],
    *,
    fit: Fit | None = None,
    invert: bool = False,
    names: Sequence[str] | None = None,
) -> Pixels:
    """Read image files: turned upright, in grey or colour, and of the network's size.

    What is transparent becomes white. Of an animation, the first picture counts.

    Args:
      paths: Files that Pillow decodes, or their content.
      image_shape: Height, width, channels: 1 for grey, 3 for colour.
      fit: How the centre of an image is cut, as in the network's test; None stretches
        the image instead.
      invert: Whether to swap dark and light.
      names: What errors and notes call them; None for the paths.

    Raises:
      DataError: If the network takes no such images, or a file is no such image; the
        message names it.
    """
    if len(image_shape) != 3 or image_shape[-1] not in pictures.MODES:
        raise DataError(
            "expected a network of images [height, width, 1 or 3], this one takes "
            f"{list(image_shape)}"
        )
    height, width, channels = image_shape
    pixels = np.empty((len(paths), *image_shape), np.uint8)
    notes = []
    names = [str(path) for path in paths] if names is None else names
    for at, (path, name) in enumerate(zip(paths, names, strict=True)):
        image = pictures.read(path, channels, name=name)
        if fit is not None:
            image = pictures.centre(image, fit)
        elif image.size != (width, height):
            before = f"{image.width}×{image.height}"
            notes.append(f"{name}: resized from {before} to {width}×{height}")
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels[at] = np.asarray(image).reshape(image_shape)
    return Pixels(255 - pixels if invert else pixels, notes)
