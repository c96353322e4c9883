"""Normalising and augmenting batches of images on the devices."""

import jax
import jax.numpy as jnp

from xnor_jax.data.sets import Augment, Source
from xnor_jax.packing import Preprocessing


def normalize(source: Source, images: jax.Array) -> jax.Array:
    """Normalise uint8 pixels by the data set's mean and standard deviation.

    Args:
      source: The mean and the deviation of each channel, of pixels in [0, 1].
      images: uint8 `[..., C]`.

    Returns:
      `(images / 255 − mean) / std`, float32 of the same shape.
    """
    return Preprocessing(source.mean, source.std)(images)


def mixup(images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mix each image of a batch with another: `λ · x_i + (1 − λ) · x_j`.

    Image i is mixed with image `batch − 1 − i`; batches are shuffled.

    Args:
      images: Normalised, float `[batch, H, W, C]`.
      key: The random key.

    Returns:
      The mixed images, and the share λ of each image's own, float `[batch]`: the larger
      of `λ` and `1 − λ` for a `λ` that is uniform in [0, 1].

    References:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, with α = 1; Beyer
      et al., Knowledge distillation: A good teacher is patient and consistent, 2022.
    """
    share = jax.random.uniform(key, (len(images),), images.dtype, minval=0.5)
    own = share.reshape(-1, *(1,) * (images.ndim - 1))
    return own * images + (1 - own) * images[::-1], share


def augment(how: Augment, images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift and mirror each image of a batch at random.

    Args:
      how: The `shift` and `flip`; `resize_crop` does not apply to images of one size.
      images: uint8 `[batch, H, W, C]`.
      key: The random key.

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
