"""The check of `image_shape` that all models share."""

from collections.abc import Sequence


def check_image_shape(
    model: str, image_shape: Sequence[int], smallest: int = 1
) -> tuple[int, int, int]:
    """Return the shape, if it has a height, width and channels that fit the model.

    Args:
      model: The model's name, for the error message.
      image_shape: Height, width, channels.
      smallest: The smallest height and width.

    Raises:
      ValueError: If it is not three numbers, or one of them is too small.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or min(shape[:2]) < smallest or shape[2] < 1:
        raise ValueError(
            f"{model}: image_shape: expected (height, width, channels) of images of at "
            f"least {smallest}×{smallest}, got {shape}"
        )
    height, width, channels = shape
    return height, width, channels
