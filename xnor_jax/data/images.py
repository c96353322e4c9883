"""Reading image files as a network's input pixels."""

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
    notes: list[str]  # one per file that was stretched to another size


def read(
    paths: Sequence[Path | bytes],
    image_shape: tuple[int, ...],
    *,
    fit: Fit | None = None,
    invert: bool = False,
    names: Sequence[str] | None = None,
) -> Pixels:
    """Read image files upright, in grey or colour, at the network's size.

    Transparent areas become white. Only the first frame of an animation is read.

    Args:
      paths: Files that Pillow decodes, or their content.
      image_shape: Height, width and channels: 1 for grey, 3 for colour.
      fit: The resize and centre crop, as in the network's evaluation; None stretches
        the image instead.
      invert: Whether to swap dark and light.
      names: Names for errors and notes; None uses the paths.

    Raises:
      DataError: If `image_shape` is not that of a grey or colour image, or a file
        cannot be decoded; the message names it.
    """
    if len(image_shape) != 3 or image_shape[-1] not in pictures.MODES:
        raise DataError(
            "expected a network with image shape [height, width, 1 or 3], got "
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


def is_converted(path: Path | bytes, pixels: np.ndarray, *, name: str) -> bool:
    """Whether `read` made a grey image from colours, or a colour image from grey.

    Args:
      path: A file that Pillow decodes, or its content.
      pixels: The image that `read` made from it, uint8 `[H, W, C]`.
      name: The image's name, for errors.

    Raises:
      DataError: If the file cannot be decoded; the message names it.
    """
    if pixels.shape[-1] == 3:
        return bool((pixels == pixels[..., :1]).all())
    colours = np.asarray(pictures.read(path, 3, name=name))
    return bool((colours != colours[..., :1]).any())
