"""Normalising and augmenting batches of images on the devices."""

import jax
import jax.numpy as jnp

from xnor_jax.data.sets import Augment, Source
from xnor_jax.packing import Preprocessing


def normalize(source: Source, images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 with the set's mean 0 and standard deviation 1.

    Args:
      source: The mean and the deviation, one per channel, as fractions of 255.
      images: uint8 `[..., C]`.

    Returns:
      `(images / 255 − mean) / std`, float32 of the same shape.
    """
    return Preprocessing(source.mean, source.std)(images)


def augment(how: Augment, images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift and mirror each image of a batch at random.

    Args:
      how: Its `shift` and `flip`; images of one size have no `resize_crop`.
      images: uint8 `[batch, H, W, C]`.
      key: Decides for each image.

    Returns:
      uint8 `[batch, H, W, C]`.
    """
    shift_key, flip_key = jax.random.split(key)
    if how.shift:
        by = how.shift
        padded = jnp.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
        corners = jax.random.randint(shift_key, (len(images), 2), 0, 2 * by + 1)

        def cut(image, corner):
            return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

        images = jax.vmap(cut)(padded, corners)
    if how.flip:
        mirror = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    return images
