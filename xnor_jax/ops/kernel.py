"""Kernels with one bit per weight, stored in the order in which products read them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xnor_jax._kernel import check_kernel, summary
from xnor_jax.geometry import positive
from xnor_jax.ops import _inference
from xnor_jax.ops._mesh import replicate
from xnor_jax.ops.bits import WORD, pack_signs, unpack_negative, words_for

_BLOCK = 2**20  # signs unpacked at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedKernel:
    """The packed signs of a kernel.

    `words[g, p, i, j, c, n]` holds the input channels `32c … 32c + 31` of the tap
    `(i, j)` of output channel `32p + n` of group `g`. Columns beyond the last output
    channel of a group, and bits beyond its last input channel, are 0.

    Attributes:
      words: uint32 `[groups, panels, *window, Cw, 32]`, with
        `panels = ceil(out_features / groups / 32)` and `Cw = ceil(in_features / 32)`.
      in_features: Input channels of one group; static.
      out_features: Output channels of all groups; static.
    """

    words: jax.Array
    in_features: int = field(metadata={"static": True})
    out_features: int = field(metadata={"static": True})

    def __repr__(self) -> str:
        return (
            f"PackedKernel(words={summary(self.words)}, "
            f"in_features={self.in_features}, out_features={self.out_features})"
        )

    @property
    def groups(self) -> int:
        """The number of channel groups."""
        return self.words.shape[0]

    @property
    def window(self) -> tuple[int, ...]:
        """The window's sizes, `()` for a dense kernel."""
        return tuple(self.words.shape[2:-2])

    @property
    def whole_words(self) -> bool:
        """Whether each group's input and output channels start at a word boundary."""
        each = self.out_features // self.groups
        return self.groups == 1 or (self.in_features % WORD == 0 == each % WORD)


def pack_kernel(kernel: ArrayLike, groups: int = 1) -> PackedKernel:
    """Pack the signs of a kernel into bits.

    Args:
      kernel: `[*window, C_in / groups, C_out]`, floating; its signs are taken.
      groups: The number of channel groups.

    Returns:
      The packed kernel.

    Raises:
      ValueError: If the kernel has rank below 2, is empty, or its output channels do
        not divide into the groups.
      TypeError: If it is not a floating point array, or when differentiated.
    """
    kernel = jnp.asarray(kernel)
    try:
        check_kernel(kernel)
    except (TypeError, ValueError) as error:
        raise type(error)(f"pack_kernel: {error}") from None
    groups = positive("pack_kernel", "groups", groups)
    if kernel.shape[-1] % groups:
        raise ValueError(
            f"pack_kernel: expected output channels that divide into the groups, got "
            f"{kernel.shape[-1]} channels and {groups} groups"
        )
    return _pack_kernel(kernel, groups=groups)


def unpack_kernel(packed: PackedKernel) -> jax.Array:
    """The signs of a packed kernel: float32 `[*window, C_in / groups, C_out]`."""
    return _unpack_kernel(packed)


def kernel_to_bytes(packed: PackedKernel) -> np.ndarray:
    """The signs in C order of `[*window, C_in / groups, C_out]`, as stored in files.

    Bit 1 stands for −1, least significant bit first; unused bits of the last byte
    are 0.

    Returns:
      uint8 `[ceil(signs / 8)]`. Peak memory is little more than its size.
    """
    words = np.asarray(packed.words)
    groups, c_in, c_out = packed.groups, packed.in_features, packed.out_features
    each, taps = c_out // groups, prod(packed.window)
    flat = words.reshape(groups, -1, taps, *words.shape[-2:])
    stored = np.zeros(-(-taps * c_in * c_out // 8), np.uint8)
    for tap, first in _blocks(taps, c_in, c_out):
        block = flat[:, :, tap, _word_slice(first)].transpose(2, 3, 0, 1, 4)
        block = block.reshape(*block.shape[:3], -1)[..., :each]
        block = np.ascontiguousarray(block.reshape(*block.shape[:2], c_out), "<u4")
        block = np.moveaxis(block.view(np.uint8).reshape(*block.shape, 4), -1, 2)
        block = block.reshape(block.shape[0], -1, c_out)  # bytes of input channels
        count = len(range(c_in)[first])
        bits = np.unpackbits(block, axis=1, count=count, bitorder="little")
        at = (tap.start * c_in + first.start) * c_out
        part = np.packbits(np.pad(bits.ravel(), (at % 8, 0)), bitorder="little")
        stored[at // 8 : at // 8 + len(part)] |= part
    return stored


def kernel_from_bytes(
    stored: np.ndarray, shape: Sequence[int], groups: int = 1
) -> PackedKernel:
    """The inverse of `kernel_to_bytes`.

    Args:
      stored: uint8 `[ceil(signs / 8)]`.
      shape: `[*window, C_in / groups, C_out]`.
      groups: The number of channel groups.

    Returns:
      The packed kernel. Peak memory is little more than its size.
    """
    *window, c_in, c_out = shape
    each, taps = c_out // groups, prod(window)
    panels = words_for(each)
    words = np.zeros((groups, panels, taps, words_for(c_in), WORD), np.uint32)
    for tap, first in _blocks(taps, c_in, c_out):
        rows, columns = len(range(taps)[tap]), len(range(c_in)[first])
        at, count = (tap.start * c_in + first.start) * c_out, rows * columns * c_out
        part = stored[at // 8 : -(-(at + count) // 8)]
        bits = np.unpackbits(part, bitorder="little")[at % 8 :][:count]
        bits = bits.reshape(rows, columns, c_out)
        bits = np.pad(bits, ((0, 0), (0, -columns % WORD), (0, 0)))
        block = np.packbits(bits, axis=1, bitorder="little")
        block = np.moveaxis(block.reshape(rows, -1, 4, c_out), 2, -1)  # bytes of a word
        block = np.ascontiguousarray(block).view("<u4").reshape(rows, -1, groups, each)
        block = np.pad(block, ((0, 0),) * 3 + ((0, panels * WORD - each),))
        block = block.reshape(rows, -1, groups, panels, WORD).transpose(2, 3, 0, 1, 4)
        words[:, :, tap, _word_slice(first)] = block
    words = words.reshape(groups, panels, *window, *words.shape[-2:])
    return PackedKernel(jnp.asarray(words), c_in, c_out)


def _blocks(taps: int, c_in: int, c_out: int) -> Iterator[tuple[slice, slice]]:
    """Contiguous blocks of a kernel `[taps, C_in, C_out]`, in whole words."""
    if c_in * c_out <= _BLOCK:
        rows = _BLOCK // (c_in * c_out)
        for tap in range(0, taps, rows):
            yield slice(tap, tap + rows), slice(0, c_in)
        return
    rows = max(1, _BLOCK // (c_out * WORD)) * WORD
    for tap in range(taps):
        for first in range(0, c_in, rows):
            yield slice(tap, tap + 1), slice(first, first + rows)


def _word_slice(channels: slice) -> slice:
    return slice(channels.start // WORD, words_for(channels.stop))


def columns(packed: PackedKernel) -> jax.Array:
    """The words with a group's output channels last: `[G, *window, Cw, C_out / G]`."""
    # Not a transpose: XLA's CPU compiler would fuse it into every consumer.
    panels = [packed.words[:, panel] for panel in range(packed.words.shape[1])]
    flat = jnp.concatenate(panels, axis=-1)
    return flat[..., : packed.out_features // packed.groups]


@partial(jax.jit, static_argnames=("groups",))
def _pack_kernel(kernel, *, groups):
    kernel = replicate(_inference.no_gradient("pack_kernel", kernel))
    *window, c_in, c_out = kernel.shape
    count, each = words_for(c_in), c_out // groups
    panels = words_for(each)
    # Transpose words, not weights: XLA's CPU compiler would read one cache line per
    # weight of a transposed kernel.
    words = pack_signs(kernel, axis=-2).reshape(*window, count, groups, each)
    spare = [(0, 0)] * (words.ndim - 1) + [(0, panels * WORD - each)]
    words = jnp.pad(words, spare).reshape(*words.shape[:-1], panels, WORD)
    return PackedKernel(jnp.moveaxis(words, (-3, -2), (0, 1)), c_in, c_out)


@jax.jit
def _unpack_kernel(packed):
    words = columns(packed)
    negative = unpack_negative(jnp.moveaxis(words, -2, -1), packed.in_features)
    # [G, *window, C_out / G, C] to [*window, C, G, C_out / G].
    negative = jnp.moveaxis(jnp.moveaxis(negative, -1, -2), 0, -2)
    signs = jnp.where(negative, jnp.float32(-1), jnp.float32(1))
    return signs.reshape(*signs.shape[:-2], packed.out_features)
