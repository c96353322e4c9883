"""Descriptions of operations for the compiled library: their numbers and arrays.

Each function returns an `Operation`; `xnor_jax.ops.cpu.run` runs a chain of them. The
library checks each operation against the result of the previous one, so nothing is
checked here.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import jax
import jax.numpy as jnp

from xnor_jax.geometry import DENSE, Geometry
from xnor_jax.ops.epilogue import Affine, Epilogue, Sums, Threshold
from xnor_jax.ops.kernel import PackedKernel


# As in engine/xla/chain.cc.
class _Kind(IntEnum):
    CONV, REAL_CONV, PACK, SUM_POOL, COL2IM, PACK_FLAGS = range(6)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operation:
    """A description of an operation of the compiled library.

    Attributes:
      arrays: Its kernel and constants.
      numbers: The fields of `OperationNumbers` in engine/xla/operation_numbers.h, in
        that order; static.
    """

    arrays: tuple[jax.Array, ...]
    numbers: tuple[int, ...] = field(metadata={"static": True})


def conv(
    kernel: PackedKernel, epilogue: Epilogue, geometry: Geometry = DENSE
) -> Operation:
    """The convolution of packed signs, with up to two spatial axes.

    Args:
      kernel: The packed kernel; each group starts at a new word of the input.
      epilogue: Applied to the sums; a `Threshold` needs whole words per group.
      geometry: The windows over the image; taps outside add 0.
    """
    code, relu, constants = _epilogue(epilogue, jnp.int32)
    channels = kernel.in_features, kernel.out_features
    words = _with_axes(kernel.words, 2, len(kernel.window))
    numbers = _numbers(_Kind.CONV, geometry, (code, relu), channels)
    return Operation((words, *constants), numbers)


def real_conv(
    kernel: jax.Array, epilogue: Epilogue, geometry: Geometry = DENSE
) -> Operation:
    """The convolution of floats, with one group and up to two spatial axes.

    Each sum runs over the window in order, with fused multiply-adds where the processor
    has them.

    Args:
      kernel: float32 `[*window, C, C_out]`.
      epilogue: Applied to the sums.
      geometry: The windows over the image, padded with zeros.
    """
    code, relu, constants = _epilogue(epilogue, jnp.float32)
    taps = _with_axes(kernel, 0, kernel.ndim - 2)
    return Operation(
        (taps, *constants), _numbers(_Kind.REAL_CONV, geometry, (code, relu))
    )


def pack() -> Operation:
    """Pack the signs of floats into words."""
    return Operation((), _numbers(_Kind.PACK))


def pack_flags(count: int) -> Operation:
    """Pack uint8 flags: the words of bit 0, then of bit 1, up to `count` of 8 bits."""
    return Operation((), _numbers(_Kind.PACK_FLAGS, channels=(count, 0)))


def sum_pool_bits(threshold: Threshold, geometry: Geometry) -> Operation:
    """Thresholded window sums of floats as bits; see `xnor_jax.ops.sum_pool_bits`."""
    arrays = (threshold.threshold, threshold.flip)
    return Operation(arrays, _numbers(_Kind.SUM_POOL, geometry))


def col2im(geometry: Geometry) -> Operation:
    """Sum float patches `[*window, C]`, one per position of the window, into the image.

    Args:
      geometry: The windows over the image; values in its padding are dropped.
    """
    spatial = _pair(geometry.spatial)
    return Operation((), _numbers(_Kind.COL2IM, geometry, channels=spatial))


def _epilogue(epilogue: Epilogue, sums: type) -> tuple[int, int, tuple]:
    match epilogue:
        case Sums():
            return 0, 0, ()
        case Affine(scale, bias, relu):
            return 1, int(relu), (scale, bias)
        case Threshold(threshold, flip):
            return 2, 0, (threshold.astype(sums), flip)


def _with_axes(array: jax.Array, at: int, spatial: int) -> jax.Array:
    """Insert unit axes, so that there are two spatial axes."""
    return jnp.expand_dims(array, range(at + spatial, at + 2))


def _numbers(
    kind: _Kind,
    geometry: Geometry = DENSE,
    epilogue: tuple[int, int] = (0, 0),
    channels: tuple[int, ...] = (0, 0),
) -> tuple[int, ...]:
    window = _pair(geometry.window)
    return (int(kind), *epilogue, *channels, *window, *geometry_numbers(geometry))


def geometry_numbers(geometry: Geometry) -> tuple[int, ...]:
    """Two strides, four paddings and two dilations; missing axes get 1, 0 and 1."""
    pads = [side for pads in geometry.padding for side in pads]
    pads += [0] * (4 - len(pads))
    return (*_pair(geometry.strides), *pads, *_pair(geometry.dilation))


def _pair(entries: tuple[int, ...]) -> tuple[int, ...]:
    return (*entries, *(1,) * (2 - len(entries)))
