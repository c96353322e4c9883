"""Where a window goes: strides, padding and dilation made explicit, and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xnor_jax.convolution import Padding, Pads, explicit_padding


@dataclass(frozen=True)
class Geometry:
    """A window's way over an image: one entry per spatial axis, hashable."""

    spatial: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Pads
    dilation: tuple[int, ...]

    @property
    def out(self) -> tuple[int, ...]:
        """The output's spatial sizes."""
        return tuple(
            (size + sum(pads) - (k - 1) * d - 1) // s + 1
            for size, k, s, pads, d in self._axes
        )

    @property
    def way(self) -> dict[str, Any]:
        """Strides, padding and dilation, as keyword arguments."""
        names = "strides", "padding", "dilation"
        return {name: getattr(self, name) for name in names}

    @property
    def padded(self) -> bool:
        """Whether any tap may fall outside the image."""
        return any(map(any, self.padding))

    @property
    def unread(self) -> tuple[int, ...]:
        """Per axis, the places of the padded image behind its last window."""
        return tuple(
            size + sum(pads) - (k - 1) * d - 1 - (out - 1) * s
            for out, (size, k, s, pads, d) in zip(self.out, self._axes, strict=True)
        )

    @property
    def transposed_padding(self) -> Pads:
        """What the transposed convolution has around its input, per axis.

        It is below 0 where the padding is wider than the window reaches.
        """
        return tuple(
            ((k - 1) * d - before, (k - 1) * d - after + unread)
            for unread, (_, k, _, (before, after), d) in zip(
                self.unread, self._axes, strict=True
            )
        )

    @property
    def shifts(self) -> tuple[tuple[slice, ...], ...]:
        """Per axis and tap, the places of the padded image that the windows meet."""
        axes = zip(self.out, self.window, self.strides, self.dilation, strict=True)
        return tuple(
            tuple(slice(t * d, t * d + (out - 1) * s + 1, s) for t in range(k))
            for out, k, s, d in axes
        )

    @property
    def inside(self) -> tuple[np.ndarray, ...]:
        """Per axis, whether a tap lies in the image: bool `[out, window]`."""
        steps = [
            np.arange(out)[:, None] * s + np.arange(k) * d - before
            for out, (_, k, s, (before, _), d) in zip(self.out, self._axes, strict=True)
        ]
        sizes = zip(steps, self.spatial, strict=True)
        return tuple((places >= 0) & (places < size) for places, size in sizes)

    @property
    def _axes(self) -> list[tuple[int, int, int, tuple[int, int], int]]:
        entries = self.spatial, self.window, self.strides, self.padding, self.dilation
        return list(zip(*entries, strict=True))


# A dense product: no spatial axis at all.
DENSE = Geometry((), (), (), (), ())


def geometry(
    where: str,
    spatial: Sequence[int],
    window: Sequence[int],
    *,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int] = 1,
) -> Geometry:
    """Strides, padding and dilation, one entry per spatial axis.

    Args:
      where: The public function's name, for errors.
      spatial: The image's spatial sizes.
      window: The window's sizes.
      strides: One number, or one per axis, above 0.
      padding: As for `explicit_padding`, 0 or more.
      dilation: One number, or one per axis, above 0.

    Raises:
      ValueError: If an entry is missing or out of range, or the window does not fit.
    """
    spatial, window = tuple(map(int, spatial)), tuple(map(int, window))
    if any(size < 1 for size in spatial):
        raise ValueError(f"{where}: expected images with pixels, got {spatial}")
    strides = _per_axis(where, "strides", strides, len(window))
    dilation = _per_axis(where, "dilation", dilation, len(window))
    if isinstance(padding, str) or isinstance(padding, int | np.integer):
        given = padding
    else:
        given = tuple(padding)
    try:
        pads = explicit_padding(given, spatial, window, strides, dilation)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if any(side < 0 for pair in pads for side in pair):
        raise ValueError(f"{where}: expected a padding of 0 or more, got {padding}")
    made = Geometry(spatial, window, strides, pads, dilation)
    if any(size < 1 for size in made.out):
        reach = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
        image = tuple(n + sum(p) for n, p in zip(spatial, pads, strict=True))
        raise ValueError(
            f"{where}: expected a window that fits into the padded image, got a window "
            f"that spans {reach} over {image}; add padding"
        )
    return made


def _per_axis(
    where: str, name: str, value: int | Sequence[int], rank: int
) -> tuple[int, ...]:
    single = isinstance(value, int | np.integer)
    values = (int(value),) * rank if single else tuple(int(v) for v in value)
    if len(values) != rank or any(v < 1 for v in values):
        raise ValueError(
            f"{where}: expected {name} of 1 or more, one number or one for each of "
            f"{rank} spatial axes, got {value}"
        )
    return values
