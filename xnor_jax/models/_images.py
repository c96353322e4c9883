"""The check of `image_shape` and `classes` that all models share."""

import operator
from collections.abc import Sequence

from xnor_jax.geometry import positive


def check_image_shape(
    model: str, image_shape: Sequence[int], classes: int, *, smallest: int = 1
) -> tuple[int, int, int]:
    """Return the shape, if height, width, channels and classes fit the model.

    Args:
      model: The model's name, for the error message.
      image_shape: Height, width, channels.
      classes: The number of logits.
      smallest: The smallest height and width.

    Raises:
      ValueError: If a number is missing, too small or not an integer.
    """
    positive(model, "classes", classes)
    try:
        height, width, channels = map(operator.index, image_shape)
    except (TypeError, ValueError):
        height = width = channels = 0
    if min(height, width) < smallest or channels < 1:
        raise ValueError(
            f"{model}: image_shape: expected (height, width, channels) of images of at "
            f"least {smallest}×{smallest}, got {image_shape}"
        )
    return height, width, channels
