"""Windows over images: validation, sizes and positions.

Users give window, strides, padding and dilation as one number or one per spatial axis.
A `Geometry` holds one entry per axis and computes all derived sizes.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from jax import lax

Padding = Literal["SAME", "VALID"] | int | Sequence[int | tuple[int, int]]
Pads = tuple[tuple[int, int], ...]

# Bounds every size, and the number of positions in a padded image: both fit int32. XLA
# aborts the process if a product of sizes overflows 64 bits.
LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Geometry:
    """Windows over an image, one entry per spatial axis; hashable.

    Attributes:
      spatial: The image's spatial sizes.
      window: The window's sizes.
      strides: The distance between neighbouring windows.
      padding: Positions added (before, after) each axis.
      dilation: The distance between neighbouring taps of a window.
    """

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
    def options(self) -> dict[str, Any]:
        """Strides, padding and dilation, as keyword arguments."""
        names = "strides", "padding", "dilation"
        return {name: getattr(self, name) for name in names}

    @property
    def padded(self) -> bool:
        """Whether any tap may fall outside the image."""
        return any(map(any, self.padding))

    @property
    def remainder(self) -> tuple[int, ...]:
        """Per axis, the positions of the padded image past its last window."""
        return tuple(
            size + sum(pads) - (k - 1) * d - 1 - (out - 1) * s
            for out, (size, k, s, pads, d) in zip(self.out, self._axes, strict=True)
        )

    @property
    def transposed_padding(self) -> Pads:
        """The padding of the transposed convolution's input, per axis.

        Negative where the padding exceeds the window's reach.
        """
        return tuple(
            ((k - 1) * d - before, (k - 1) * d - after + remainder)
            for remainder, (_, k, _, (before, after), d) in zip(
                self.remainder, self._axes, strict=True
            )
        )

    @property
    def shifts(self) -> tuple[tuple[slice, ...], ...]:
        """Per axis and tap, the tap's positions in the padded image for all windows."""
        axes = zip(self.out, self.window, self.strides, self.dilation, strict=True)
        return tuple(
            tuple(slice(t * d, t * d + (out - 1) * s + 1, s) for t in range(k))
            for out, k, s, d in axes
        )

    @property
    def inside(self) -> tuple[np.ndarray, ...]:
        """Per axis, whether a tap lies in the image: bool `[out, window]`."""
        places = [
            np.arange(out)[:, None] * s + np.arange(k) * d - before
            for out, (_, k, s, (before, _), d) in zip(self.out, self._axes, strict=True)
        ]
        sizes = zip(places, self.spatial, strict=True)
        return tuple((places >= 0) & (places < size) for places, size in sizes)

    @property
    def _axes(self) -> list[tuple[int, int, int, tuple[int, int], int]]:
        entries = self.spatial, self.window, self.strides, self.padding, self.dilation
        return list(zip(*entries, strict=True))


# A dense product: no spatial axes.
DENSE = Geometry((), (), (), (), ())


def conv_geometry(
    where: str,
    spatial: Sequence[int],
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int] = 1,
) -> Geometry:
    """The windows of a convolution.

    Args:
      where: The public function's or layer's name, for errors.
      spatial: The image's spatial sizes, 1 or more.
      window: One size, or one per spatial axis; 1 or more.
      strides: One number, or one per spatial axis; 1 or more.
      padding: `"SAME"`, `"VALID"`, one number for all sides, or per axis a number or a
        pair (before, after); 0 or more.
      dilation: One number, or one per spatial axis; 1 or more.

    Raises:
      ValueError: If an entry is missing, not an integer or out of range, or the window
        does not fit into the padded image.
    """
    sizes = []
    for size in spatial:
        if _whole(size) is None:
            raise ValueError(
                f"{where}: expected images whose spatial sizes are known, got "
                f"{tuple(spatial)}"
            )
        sizes.append(int(size))
    spatial, rank = tuple(sizes), len(sizes)
    if any(not 1 <= size <= LARGEST_SIZE for size in spatial):
        raise ValueError(
            f"{where}: expected spatial sizes from 1 to 2**31 - 1, got {spatial}"
        )
    window = per_axis(where, "window", window, rank)
    strides = per_axis(where, "strides", strides, rank)
    dilation = per_axis(where, "dilation", dilation, rank)
    reach = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
    pads = _explicit_padding(where, padding, spatial, reach, strides)
    image = tuple(n + sum(p) for n, p in zip(spatial, pads, strict=True))
    if prod(image) > LARGEST_SIZE:
        raise ValueError(
            f"{where}: expected at most 2**31 - 1 positions in a padded image, got "
            f"{spatial} with a padding of {pads}"
        )
    if any(k > size for k, size in zip(reach, image, strict=True)):
        raise ValueError(
            f"{where}: expected a window that fits into the padded image, got a window "
            f"that spans {reach} over {image}; add padding"
        )
    return Geometry(spatial, window, strides, pads, dilation)


def pool_geometry(
    where: str,
    spatial: Sequence[int],
    window: int | Sequence[int],
    *,
    strides: int | Sequence[int],
    padding: Padding,
) -> Geometry:
    """The windows of a pool: as in a convolution, but larger than the padding.

    Args:
      where: The public function's or layer's name, for errors.
      spatial: The image's spatial sizes, 1 or more.
      window: One size, or one per spatial axis; 1 or more.
      strides: One number, or one per spatial axis; 1 or more.
      padding: As for a convolution, smaller than the window.

    Raises:
      ValueError: As for a convolution, or if the padding is as large as the window.
    """
    found = conv_geometry(where, spatial, window, strides=strides, padding=padding)
    if any(max(p) >= k for p, k in zip(found.padding, found.window, strict=True)):
        raise ValueError(
            f"{where}: expected a padding smaller than the window, got "
            f"{found.padding} and a window of {found.window}"
        )
    return found


def per_axis(where: str, name: str, value: Any, rank: int) -> tuple[int, ...]:
    """Check integers from 1 to `LARGEST_SIZE`, one per spatial axis.

    Args:
      where: The public function's or layer's name, for errors.
      name: The argument's name, for errors.
      value: One number, or one per spatial axis.
      rank: The number of spatial axes.

    Raises:
      ValueError: If an entry is missing, not an integer or out of range.
    """
    single = _whole(value)
    if single is not None:
        values = (single,) * rank
    else:
        values = tuple(map(_whole, _entries(value) or ()))
    found = tuple(v for v in values if v is not None and 1 <= v <= LARGEST_SIZE)
    if len(found) != rank or len(values) != rank:
        raise ValueError(
            f"{where}: expected {name} of 1 or more and below 2**31, one number or one "
            f"for each of {rank} spatial axes, got {value!r}"
        )
    return found


def kernel_window(where: str, kernel_size: Any) -> tuple[int, ...]:
    """Check a layer's window; the number of its entries is that of the spatial axes.

    Args:
      where: The layer's name, for errors.
      kernel_size: One number per spatial axis; one number for rank 1.

    Raises:
      ValueError: If it has not 1 to 3 entries, all integers in range.
    """
    entries = _entries(kernel_size)
    rank = 1 if entries is None else len(entries)
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{where}: kernel_size: expected 1 to 3 spatial axes, got {kernel_size}"
        )
    return per_axis(where, "kernel_size", kernel_size, rank)


def positive(where: str, name: str, value: Any) -> int:
    """Check an integer from 1 to `LARGEST_SIZE`, such as a number of groups.

    Args:
      where: The public function's or layer's name, for errors.
      name: The argument's name, for errors.
      value: The number.

    Raises:
      ValueError: If it is not an integer or out of range.
    """
    found = _whole(value)
    if found is None or not 1 <= found <= LARGEST_SIZE:
        raise ValueError(
            f"{where}: expected {name} of 1 or more and below 2**31, got {value!r}"
        )
    return found


def check_features(
    where: str, in_features: int, out_features: int, *, groups: int = 1
) -> None:
    """Check that channels are positive integers that divide into the groups.

    Args:
      where: The layer's name, for errors.
      in_features: The number of input channels.
      out_features: The number of output channels.
      groups: The number of channel groups.

    Raises:
      ValueError: If they are not.
    """
    positive(where, "in_features", in_features)
    positive(where, "out_features", out_features)
    positive(where, "feature_group_count", groups)
    if in_features % groups or out_features % groups:
        raise ValueError(
            f"{where}: feature_group_count: {groups} does not divide both in_features "
            f"{in_features} and out_features {out_features}"
        )


def check_padding(where: str, padding: Any) -> Padding:
    """Check a padding and make it hashable, with tuples for sequences.

    Args:
      where: The public function's or layer's name, for errors.
      padding: As for `conv_geometry`.

    Raises:
      ValueError: If it is another string, or an entry is not an integer in range.
    """
    if isinstance(padding, str):
        if padding in ("SAME", "VALID"):
            return padding
    elif (single := _whole(padding)) is not None:
        if 0 <= single <= LARGEST_SIZE:
            return single
    elif (given := _entries(padding)) is not None:
        entries = [_pad_entry(entry) for entry in given]
        found = [entry for entry in entries if entry is not None]
        if len(found) == len(entries):
            return tuple(found)
    raise ValueError(
        f"{where}: expected a padding of 0 or more and below 2**31, one number or per "
        f"spatial axis a number or (before, after), or 'SAME' or 'VALID', got "
        f"{padding!r}"
    )


def _pad_entry(entry: Any) -> int | tuple[int, int] | None:
    single = _whole(entry)
    if single is not None:
        return single if 0 <= single <= LARGEST_SIZE else None
    sides = tuple(map(_whole, _entries(entry) or ()))
    found = tuple(
        side for side in sides if side is not None and 0 <= side <= LARGEST_SIZE
    )
    return found if len(sides) == 2 and len(found) == 2 else None


def _explicit_padding(
    where: str,
    padding: Padding,
    spatial: tuple[int, ...],
    reach: tuple[int, ...],
    strides: tuple[int, ...],
) -> Pads:
    padding = check_padding(where, padding)
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(spatial, reach, strides, padding)
        return tuple((int(before), int(after)) for before, after in pads)
    if isinstance(padding, int):
        return ((padding, padding),) * len(spatial)
    if len(padding) != len(spatial):
        raise ValueError(
            f"{where}: padding: expected {len(spatial)} entries, one per spatial axis, "
            f"got {padding}"
        )
    return tuple((p, p) if isinstance(p, int) else p for p in padding)


def _entries(value: Any) -> tuple[Any, ...] | None:
    """The entries of a sequence or an array; None for anything else."""
    array = isinstance(value, np.ndarray) and value.ndim > 0
    sequence = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return tuple(value) if array or sequence else None


def _whole(value: Any) -> int | None:
    """An integer as an int; None for anything else, including booleans."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
