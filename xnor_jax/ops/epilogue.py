"""Epilogues: what is computed from a product's sums."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from xnor_jax.ops.bits import pack_negative, words_for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """The sums unchanged: int32, or float32 for a real convolution."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """`scale · acc + bias` in float32, with an optional ReLU.

    Attributes:
      scale: float32 `[C_out]`.
      bias: float32 `[C_out]`.
      relu: Whether negative results become 0; static.
    """

    scale: jax.Array
    bias: jax.Array
    relu: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Threshold:
    """The sign of the sums as bits: `(acc < threshold) xor flip`.

    A channel that is always +1 has the smallest possible threshold (−2³¹, or −inf) and
    flip bit 0; one that is always −1 has the same threshold and flip bit 1.

    Attributes:
      threshold: `[C_out]`; int32 for sums of signs, float32 for real ones.
      flip: uint32 words `[ceil(C_out / 32)]`: bit 1 inverts a channel's comparison.
        Unused bits are 0.
    """

    threshold: jax.Array
    flip: jax.Array


Epilogue = Sums | Affine | Threshold


def apply_epilogue(acc: jax.Array, epilogue: Epilogue) -> jax.Array:
    """Apply an epilogue to sums.

    Args:
      acc: Sums `[..., C_out]`, int32 or float32.
      epilogue: The epilogue.

    Returns:
      `Sums`: `acc`. `Affine`: float32 `[..., C_out]`. `Threshold`: uint32 words
      `[..., ceil(C_out / 32)]`.
    """
    match epilogue:
        case Sums():
            return acc
        case Affine(scale, bias, relu):
            y = scale * acc.astype(jnp.float32) + bias
            return jnp.maximum(y, 0) if relu else y
        case Threshold(threshold, flip):
            # As in `sign`, NaN is -1.
            return pack_negative(~(acc >= threshold)) ^ flip


def check_epilogue(where: str, epilogue: Epilogue, features: int, dtype: type) -> None:
    """Check that an epilogue fits the sums.

    Args:
      where: The public function's name, for errors.
      epilogue: The epilogue.
      features: The number of output channels.
      dtype: The dtype of the sums.

    Raises:
      ValueError: If an array does not have one entry (or bit) per channel.
      TypeError: If it is not an epilogue, or a dtype is wrong.
    """
    match epilogue:
        case Sums():
            wanted = {}
        case Affine():
            wanted = dict.fromkeys(("scale", "bias"), ((features,), jnp.float32))
        case Threshold():
            wanted = {
                "threshold": ((features,), dtype),
                "flip": ((words_for(features),), jnp.uint32),
            }
        case _:
            raise TypeError(
                f"{where}: expected Sums, Affine or Threshold as epilogue, got "
                f"{type(epilogue).__name__}"
            )
    for name, (shape, kind) in wanted.items():
        leaf = getattr(epilogue, name)
        label = f"{type(epilogue).__name__}.{name}"
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"{where}: expected {label} of shape {shape}, got {tuple(leaf.shape)}"
            )
        if leaf.dtype != kind:
            raise TypeError(
                f"{where}: expected {label} of {jnp.dtype(kind)}, got {leaf.dtype}"
            )
