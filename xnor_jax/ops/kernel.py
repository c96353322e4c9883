"""Kernels at one bit a weight, laid out for the product to read them in order."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xnor_jax._kernel import check_kernel, summary
from xnor_jax.geometry import positive
from xnor_jax.ops import _inference
from xnor_jax.ops.bits import WORD, pack_signs, unpack_negative, words_for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedKernel:
    """The signs of a kernel as bits.

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
        """How many groups the channels fall into."""
        return self.words.shape[0]

    @property
    def window(self) -> tuple[int, ...]:
        """The spatial sizes, `()` for a dense kernel."""
        return tuple(self.words.shape[2:-2])

    @property
    def whole_words(self) -> bool:
        """Whether each group's channels begin at a word, on both sides."""
        each = self.out_features // self.groups
        return self.groups == 1 or (self.in_features % WORD == 0 == each % WORD)


def pack_kernel(kernel: ArrayLike, groups: int = 1) -> PackedKernel:
    """The signs of a kernel as bits.

    Args:
      kernel: `[*window, C_in / groups, C_out]`, floating; its signs are taken.
      groups: How many groups the output channels fall into.

    Returns:
      The packed kernel.

    Raises:
      ValueError: If the kernel has rank below 2, is empty, or its output channels do
        not divide into the groups.
      TypeError: If it is not of floating point numbers; or when differentiated.
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


def columns(packed: PackedKernel) -> jax.Array:
    """The words with a group's output channels last: `[G, *window, Cw, C_out / G]`."""
    # Not a transposition: XLA's CPU compiler would fuse that into whatever reads it.
    panels = [packed.words[:, panel] for panel in range(packed.words.shape[1])]
    flat = jnp.concatenate(panels, axis=-1)
    return flat[..., : packed.out_features // packed.groups]


@partial(jax.jit, static_argnames=("groups",))
def _pack_kernel(kernel, *, groups):
    kernel = _inference.no_gradient("pack_kernel", kernel)
    *window, c_in, c_out = kernel.shape
    count, each = words_for(c_in), c_out // groups
    panels = words_for(each)
    # Only words move: XLA's CPU compiler would read a transposed kernel a cache line
    # a weight.
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
