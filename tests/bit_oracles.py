"""Bit packing in plain Python, and random binary convolutions with their sums."""

from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np
import reference_loop as loop


def sign(x: Any) -> np.ndarray:
    return np.where(np.asarray(x) >= 0, 1, -1)


def bits(x: Any) -> np.ndarray:
    """Pack signs: bit k % 32 of word k // 32 is 1 where sign(x[k]) is -1."""
    x = np.asarray(x)
    words = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 32)), np.uint32)
    for k in range(x.shape[-1]):
        words[..., k // 32] |= np.where(x[..., k] >= 0, 0, 1 << (k % 32)).astype("u4")
    return words


def kernel_words(kernel: np.ndarray, groups: int) -> np.ndarray:
    """Pack a kernel in the layout of `PackedKernel`."""
    *window, c_in, c_out = kernel.shape
    each = c_out // groups
    panels, count = -(-each // 32), -(-c_in // 32)
    words = np.zeros((groups, panels, *window, count, 32), np.uint32)
    for group in range(groups):
        for first in range(0, each, 32):
            columns = slice(group * each + first, group * each + min(first + 32, each))
            part = bits(np.moveaxis(kernel[..., columns], -2, -1))
            lanes = slice(part.shape[-2])
            words[group, first // 32, ..., lanes] = np.moveaxis(part, -1, -2)
    return words


class Case(NamedTuple):
    """A convolution's shapes; `channels` counts all groups."""

    spatial: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Any
    groups: int
    channels: int
    features: int
    batch: int
    seed: int = 0

    @property
    def pads(self) -> loop.Pads:
        """The padding as (before, after) pairs."""
        if self.padding == "SAME":
            return loop.same_pads(
                self.spatial, self.window, self.strides, self.dilation
            )
        if self.padding == "VALID":
            return ((0, 0),) * len(self.window)
        return self.padding

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the convolution functions."""
        return {
            "strides": self.strides,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw images and a kernel; both contain 0 and -0."""
        rng = np.random.default_rng(self.seed)
        shapes = (
            (self.batch, *self.spatial, self.channels),
            (*self.window, self.channels // self.groups, self.features),
        )
        images, kernel = (
            (rng.integers(-2, 3, shape) * rng.choice([-1.0, 1.0], shape)).astype("f")
            for shape in shapes
        )
        return images, kernel

    def sums(self) -> np.ndarray:
        """The result expected of every backend."""
        x, kernel = map(sign, self.arrays())
        way = self.strides, self.pads, self.dilation, self.groups
        return loop.conv(x, kernel, *way).astype(np.int64)


@st.composite
def cases(draw, ranks=(1, 2, 3), most_channels: int = 130) -> Case:
    """Draw a valid convolution: windows up to 9, dilation, groups, any padding."""
    rank = draw(st.sampled_from(ranks))
    longest = {1: 9, 2: 7, 3: 3}[rank]
    window = tuple(draw(st.integers(1, longest)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    padding = draw(st.sampled_from(["SAME", "VALID", "pairs", "pairs"]))
    if padding == "pairs":
        padding = tuple(
            (draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(rank)
        )
    missing = (
        [sum(p) for p in padding] if padding not in ("SAME", "VALID") else [0] * rank
    )
    reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    least = [
        1 if padding == "SAME" else max(1, r - p)
        for r, p in zip(reach, missing, strict=True)
    ]
    spatial = tuple(n + draw(st.integers(0, 5)) for n in least)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    # Word boundaries are drawn more often: most bugs occur there.
    each = st.integers(1, max(1, most_channels // groups))
    edges = st.sampled_from([n for n in (1, 31, 32, 33, 64, 65) if n <= most_channels])
    return Case(
        spatial,
        window,
        strides,
        dilation,
        padding,
        groups,
        draw(each | edges) * groups,
        draw(st.integers(1, 40) | edges) * groups,
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )
