"""What every model asks of its images."""

from collections.abc import Sequence


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the shape if it is height, width and channels, each at least 1.

    Raises:
      ValueError: If it is not.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            "image_shape: expected (height, width, channels), each at least 1, got "
            f"{tuple(image_shape)}"
        )
    height, width, channels = image_shape
    return height, width, channels
