"""Signs as bits, 32 per uint32 word.

Element k of the packed axis is bit `k % 32` of word `k // 32`, counted from the least
significant bit. Bit 1 stands for −1: `x >= 0` gives bit 0, so ±0 is +1, as in
`xnor_jax.sign`. Unused bits of the last word are 0. Thus, over n signs,
`Σ aᵢbᵢ = n − 2·popcount(a xor b)`.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from xnor_jax._kernel import check_real, describe, summary
from xnor_jax.ops import _inference

WORD = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits:
    """Signs whose last axis is packed.

    Attributes:
      words: uint32 `[..., ceil(size / 32)]`; unused bits are 0.
      size: The number of signs in the last axis; static.
    """

    words: jax.Array
    size: int = field(metadata={"static": True})

    def __repr__(self) -> str:
        return f"Bits(words={summary(self.words)}, size={self.size})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The signs' shape, `[..., size]`."""
        return (*self.words.shape[:-1], self.size)


def pack_bits(x: ArrayLike, axis: int = -1) -> jax.Array:
    """Pack the signs of `x` into bits: bit 1 where `xnor_jax.sign(x)` is −1.

    Args:
      x: An array with at least one axis, floating or integer.
      axis: The axis to pack.

    Returns:
      uint32 words; the packed axis of length `n` becomes `ceil(n / 32)` long.

    Raises:
      ValueError: If there is no such axis.
      TypeError: If `x` is neither floating nor integer, or when differentiated.

    Examples:
      >>> import jax.numpy as jnp, xnor_jax as xnor
      >>> xnor.ops.pack_bits(jnp.array([1.0, -2.0, 0.0, -0.5]))
      Array([10], dtype=uint32)
    """
    x = jnp.asarray(x)
    check_real("pack_bits", x)
    return _pack(x, axis=_axis("pack_bits", x, axis))


def unpack_bits(
    words: ArrayLike, size: int, axis: int = -1, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Unpack words into signs.

    Args:
      words: uint32; the packed axis is `ceil(size / 32)` long.
      size: The number of signs in the packed axis.
      axis: The packed axis.
      dtype: The dtype of the signs, floating or a signed integer.

    Returns:
      Signs in {−1, +1}; the packed axis is `size` long.

    Raises:
      ValueError: If there is no such axis, or its length does not match `size`.
      TypeError: If the words are not uint32, or the dtype cannot hold −1.
    """
    dtype = jnp.dtype(dtype)
    if not any(
        jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.signedinteger)
    ):
        raise TypeError(
            f"unpack_bits: expected a dtype that holds −1 and +1, got {dtype}"
        )
    words = jnp.asarray(words)
    check_words("unpack_bits", words)
    axis = _axis("unpack_bits", words, axis)
    if words.shape[axis] != words_for(size):
        raise ValueError(
            f"unpack_bits: expected {words_for(size)} words for {size} signs, got "
            f"{words.shape[axis]}"
        )
    return _unpack(words, size=size, axis=axis, dtype=dtype)


def words_for(size: int) -> int:
    """The number of words for `size` bits: `ceil(size / 32)`."""
    return -(-size // WORD)


def check_words(where: str, words: jax.Array) -> None:
    """Check that words are uint32.

    Raises:
      TypeError: If they have another dtype.
    """
    if getattr(words, "dtype", None) != jnp.uint32:
        raise TypeError(f"{where}: expected uint32 words, got {describe(words)}")


def pack_signs(x: jax.Array, axis: int = -1) -> jax.Array:
    """Words of the signs of `x`: the axis of length `n` becomes `ceil(n / 32)` long."""
    # The comparison of `xnor_jax.sign`, in which NaN is -1 and subnormals may be 0.
    return pack_negative(~(x >= 0), axis)


def pack_negative(negative: jax.Array, axis: int = -1) -> jax.Array:
    """Words of booleans, True for bit 1: the axis becomes `ceil(n / 32)` long."""
    axis %= negative.ndim
    before, after = negative.shape[:axis], negative.shape[axis + 1 :]
    count = words_for(negative.shape[axis])
    spare = [(0, 0)] * negative.ndim
    spare[axis] = (0, count * WORD - negative.shape[axis])
    bits = jnp.pad(negative, spare).reshape(*before, count, WORD, *after)
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(-1, *(1,) * len(after))
    return jnp.sum(bits.astype(jnp.uint32) << places, axis + 1, dtype=jnp.uint32)


def unpack_negative(words: jax.Array, size: int) -> jax.Array:
    """Booleans `[..., size]` of words `[..., ceil(size / 32)]`, True for bit 1."""
    places = jnp.arange(WORD, dtype=jnp.uint32)
    bits = (words[..., None] >> places) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], words.shape[-1] * WORD)[..., :size] != 0


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Booleans, each True with probability 1/2, from one random bit each."""
    words = (*shape[:-1], words_for(shape[-1]))
    return unpack_negative(jax.random.bits(key, words, jnp.uint32), shape[-1])


def signs(words: jax.Array, size: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Signs `[..., size]` in {−1, +1} of words `[..., ceil(size / 32)]`."""
    negative = unpack_negative(words, size)
    return jnp.where(negative, jnp.array(-1, dtype), jnp.array(1, dtype))


def _axis(where: str, x: jax.Array, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"{where}: expected an axis of an array of shape {x.shape}, got {axis}"
        )
    return axis % x.ndim


@partial(jax.jit, static_argnames=("axis",))
def _pack(x, *, axis):
    return pack_signs(_inference.no_gradient("pack_bits", x), axis)


@partial(jax.jit, static_argnames=("size", "axis", "dtype"))
def _unpack(words, *, size, axis, dtype):
    return jnp.moveaxis(signs(jnp.moveaxis(words, axis, -1), size, dtype), -1, axis)
