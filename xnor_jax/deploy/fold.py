"""From a function between two signs to one comparison of the sum before it.

Between two binary layers stand α, a bias, ReLU, max-pooling and BatchNorm: per channel
a monotone function `f` of the integer sum, in floating point as in real numbers, since
rounding is monotone. Its sign is then `sum < threshold`, or the contrary. The threshold
is not solved for, which would round differently: `f` itself, as the model computes it,
is asked where its sign changes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.ops import Threshold, pack_bits
from xnor_jax.weights import sign

# `(params, sums) -> values`, each [rows, C]: jitted with the parameters as arguments,
# as in the model; constants might be folded with another rounding.
Value = Callable[[Any, jax.Array], jax.Array]

_CHUNK = 2**21  # Values at a time: 8 MB of float32.
_LARGEST = int(np.float32(np.finfo(np.float32).max).view(np.int32))


def integer_threshold(
    value: Value, params: Any, *, bound: int, features: int
) -> Threshold:
    """The threshold on integer sums at which the sign of `value` changes.

    Every integer in `[−bound, bound]` is tried, so that the answer holds for all.

    Args:
      value: `(params, sums) -> values`, float32 `[rows, C]` to float32 `[rows, C]`,
        monotone (either way, or constant) in each channel.
      params: A pytree of arrays that `value` reads.
      bound: The largest magnitude of a sum, `n` for a filter of `n` weights.
      features: `C`.

    Returns:
      An int32 threshold with `(sum < threshold) xor flip == (sign(value) < 0)`.

    Raises:
      ValueError: If some channel's sign changes more than once or is nowhere a number,
        because its numbers overflow or are NaN.
    """
    rows = min(2 * bound + 1, max(1, _CHUNK // features))

    @jax.jit
    def evaluate(params, start):
        sums = start + jnp.arange(rows, dtype=jnp.int32)
        sums = jnp.broadcast_to(sums[:, None], (rows, features))
        return _sign_and_nan(value(params, sums.astype(jnp.float32)))

    first, last = np.zeros(features, bool), np.empty((0, features), bool)
    changes, positive, nans = (np.zeros(features, np.int64) for _ in range(3))
    for start in range(-bound, bound + 1, rows):
        chunk, nan = map(np.asarray, evaluate(params, np.int32(start)))
        chunk, nan = (part[: bound + 1 - start] for part in (chunk, nan))
        first = chunk[0] if start == -bound else first
        neighbours = np.concatenate([last, chunk])
        changes += (neighbours[1:] != neighbours[:-1]).sum(0)
        positive += chunk.sum(0)
        nans += nan.sum(0)
        last = chunk[-1:]
    total = 2 * bound + 1
    _refuse(nans == total, "is NaN for every sum")
    _refuse(changes > 1, "overflows: its sign changes more than once")
    # Sums below the threshold: the negative ones where the sign rises, else the others.
    below = np.where(first, positive, total - positive)
    threshold = np.where(changes == 0, np.iinfo(np.int32).min, below - bound)
    return _threshold(threshold.astype(np.int32), first, changes == 0)


def float_threshold(value: Value, params: Any, *, features: int) -> Threshold:
    """The threshold on float32 sums at which the sign of `value` changes.

    A binary search over the 2³² float32 numbers in their order.

    Args:
      value: `(params, sums) -> values`, float32 `[rows, C]` to float32 `[rows, C]`,
        monotone (either way, or constant) in each channel.
      params: A pytree of arrays that `value` reads.
      features: `C`.

    Returns:
      A float32 threshold with `(sum < threshold) xor flip == (sign(value) < 0)`.

    Raises:
      ValueError: If `value` is NaN at 0 in some channel.
    """

    @jax.jit
    def evaluate(params, sums):
        return _sign_and_nan(value(params, sums[None])[0])

    def ask(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sign_is_plus, nan = evaluate(params, _from_codes(codes))
        return np.asarray(sign_is_plus), np.asarray(nan)

    zero = np.zeros(features, np.int64)
    _refuse(ask(zero)[1], "is NaN at a sum of 0")
    # Beyond some magnitude the function itself may overflow: infinity times a scale of
    # 0 is NaN. The sums that a network meets lie within.
    low = _bisect(lambda codes: ~ask(codes)[1], zero - _LARGEST, zero)
    high = _bisect(lambda codes: ask(codes)[1], zero, zero + _LARGEST) - 1
    high = np.where(ask(zero + _LARGEST)[1], high, _LARGEST)
    first, last = ask(low)[0], ask(high)[0]
    at = _bisect(lambda codes: ask(codes)[0] != first, low, high)
    constant = first == last
    threshold = np.where(constant, np.float32(-np.inf), _from_codes(at))
    return _threshold(threshold, first, constant)


def flip_words(flip: np.ndarray) -> jax.Array:
    """Words with bit 1 where `flip` is true, `[C]`."""
    return pack_bits(np.where(flip, np.float32(-1), np.float32(1)))


def _sign_and_nan(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return sign(values) > 0, jnp.isnan(values)


def _threshold(threshold: np.ndarray, first: np.ndarray, constant: np.ndarray):
    """Flip where the smallest sums are +1 and others are not, or all are −1."""
    flip = np.where(constant, ~first, first)
    return Threshold(jnp.asarray(threshold), flip_words(flip))


def _bisect(
    holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The smallest code in `[low, high]` at which `holds`, which it then goes on to do.

    `high` where it holds nowhere below it.
    """
    low, high = low.copy(), high.copy()
    while (low < high).any():
        middle = (low + high) >> 1
        found = holds(middle)
        active = low < high
        high = np.where(active & found, middle, high)
        low = np.where(active & ~found, middle + 1, low)
    return low


def _from_codes(codes: np.ndarray) -> np.ndarray:
    """Float32 numbers from consecutive integers in their order; 0 is 0."""
    magnitudes = np.abs(codes).astype(np.int32).view(np.float32)
    return np.where(codes < 0, -magnitudes, magnitudes)


def _refuse(bad: np.ndarray, what: str) -> None:
    if bad.any():
        raise ValueError(
            f"expected numbers that fit float32, got values whose channel "
            f"{int(np.flatnonzero(bad)[0])} {what}"
        )
