"""Reduce the function between two signs to one comparison of the sum.

Between two binary layers, α, the bias, ReLU, max-pooling and BatchNorm form a monotone
function `f` of the integer sum in each channel, also in floating point, since rounding
is monotone. The sign of `f` is then `sum < threshold` or its negation. Solving for the
threshold would round differently, so it is found by evaluating `f` as the model
computes it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.ops import Threshold, pack_bits


class Evaluation(NamedTuple):
    """The function between two signs, evaluated on sums `[rows, C]`.

    Attributes:
      heads: The input `[rows, C]` of each max-pool.
      plus: Whether the sign is +1, `[rows, C]`.
      nan: Whether the compared value is NaN, `[rows, C]`.
    """

    heads: list[jax.Array]
    plus: jax.Array
    nan: jax.Array


# Jitted with the constants as arguments, as in the model: folded into the program, they
# might round differently.
Function = Callable[[Any, jax.Array], Evaluation]


class FoldedThreshold(NamedTuple):
    """A threshold, and per max-pool the channels where the function after it falls."""

    threshold: Threshold
    falls: list[np.ndarray]


_CHUNK = 2**21  # Values per evaluation: 8 MB of float32.
_LARGEST = int(np.float32(np.finfo(np.float32).max).view(np.int32))


def integer_threshold(
    function: Function, params: Any, *, bound: int, features: int, pools: int = 0
) -> FoldedThreshold | None:
    """Find the threshold on integer sums at which a sign changes.

    Every integer in `[−bound, bound]` is evaluated, so the function need not be known
    to be monotone.

    Args:
      function: `(params, sums) -> Evaluation`, on float32 sums `[rows, C]`.
      params: A pytree of arrays that `function` reads.
      bound: The largest magnitude of a sum, `n` for a filter of `n` weights.
      features: `C`.
      pools: Number of max-pools in the function.

    Returns:
      An int32 threshold with `(sum < threshold) xor flip == (sign == −1)`; None if in
      some channel the sign changes more than once, or the input of a max-pool is not
      monotone in the sum.
    """
    rows = min(2 * bound + 1, max(2, _CHUNK // features))

    @jax.jit
    def evaluate(params, start):
        sums = start + jnp.arange(rows, dtype=jnp.int32)
        sums = jnp.broadcast_to(sums[:, None], (rows, features))
        return function(params, sums.astype(jnp.float32))

    first = np.zeros(features, bool)
    changes = np.zeros(features, np.int64)
    threshold = np.full(features, np.iinfo(np.int32).min)
    rises, drops = (np.zeros((pools, features), bool) for _ in range(2))
    for start in range(-bound, bound, rows - 1):  # neighbouring chunks share a row
        evaluation = evaluate(params, np.int32(start))
        kept = bound + 1 - start
        plus, *heads = (
            np.asarray(a)[:kept] for a in (evaluation.plus, *evaluation.heads)
        )
        first = plus[0] if start == -bound else first
        changed = plus[1:] != plus[:-1]
        changes += changed.sum(0)
        at = start + 1 + changed.argmax(0)
        threshold = np.where(changed.any(0), at, threshold)
        for rise, drop, head in zip(rises, drops, heads, strict=True):
            # NaN compares as neither larger nor smaller: it counts as both.
            nan = np.isnan(head).any(0)
            rise |= (head[1:] > head[:-1]).any(0) | nan
            drop |= (head[1:] < head[:-1]).any(0) | nan
    if (changes > 1).any() or (rises & drops).any():
        return None
    constant = changes == 0
    # The sign falls over a pool's input if exactly one of the two falls over the sum.
    falls = [~constant & (first ^ down) for down in drops]
    threshold = threshold.astype(np.int32)
    return FoldedThreshold(_threshold(threshold, first, constant), falls)


def float_threshold(
    function: Function, params: Any, *, features: int, slopes: list[np.ndarray]
) -> FoldedThreshold | None:
    """Find the threshold on float32 sums at which a sign changes.

    A binary search over the finite float32 numbers in order.

    Args:
      function: `(params, sums) -> Evaluation`, on float32 sums `[rows, C]`, monotone
        (rising, falling or constant) in each channel.
      params: A pytree of arrays that `function` reads.
      features: `C`.
      slopes: Per max-pool the sign of its input's slope over the sum, −1, 0 or 1 for
        each channel.

    Returns:
      A float32 threshold with `(sum < threshold) xor flip == (sign == −1)`; None if
      the compared value is NaN at a sum of 0 in some channel.
    """

    @jax.jit
    def evaluate(params, sums):
        return function(params, sums[None])

    def probe(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        evaluation = evaluate(params, _from_codes(codes))
        return np.asarray(evaluation.plus)[0], np.asarray(evaluation.nan)[0]

    zero = np.zeros(features, np.int64)
    if probe(zero)[1].any():
        return None
    # Large sums may overflow in the function, and infinity times a scale of 0 is NaN:
    # the search covers the range without NaN, in which a network's sums lie.
    low = _bisect(lambda codes: ~probe(codes)[1], zero - _LARGEST, zero)
    high = _bisect(lambda codes: probe(codes)[1], zero, zero + _LARGEST) - 1
    high = np.where(probe(zero + _LARGEST)[1], high, _LARGEST)
    first, last = probe(low)[0], probe(high)[0]
    at = _bisect(lambda codes: probe(codes)[0] != first, low, high)
    constant = first == last
    threshold = np.where(constant, np.float32(-np.inf), _from_codes(at))
    falls = [~constant & (first ^ (slope < 0)) for slope in slopes]
    return FoldedThreshold(_threshold(threshold, first, constant), falls)


def flip_words(flip: np.ndarray) -> jax.Array:
    """uint32 words with bit 1 where `flip`, bool `[C]`, is true."""
    return pack_bits(np.where(flip, np.float32(-1), np.float32(1)))


def _threshold(threshold: np.ndarray, first: np.ndarray, constant: np.ndarray):
    """Flip channels where only the smallest sums are +1, or all sums are −1."""
    flip = np.where(constant, ~first, first)
    return Threshold(jnp.asarray(threshold), flip_words(flip))


def _bisect(
    holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """The smallest code in `[low, high]` at which `holds` is true.

    `holds` stays true above that code; `high` if it is false everywhere below.
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
    """Map consecutive integers to float32 numbers in order; 0 maps to 0."""
    magnitudes = np.abs(codes).astype(np.int32).view(np.float32)
    return np.where(codes < 0, -magnitudes, magnitudes)
