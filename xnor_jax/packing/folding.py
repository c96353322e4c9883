"""Fold the operations between a product and a sign into one threshold per channel.

Each sign is traced back, through max-pools, to the earliest value of which it is a
per-channel function. If that value is the integer sum of a product of signs, and
nothing else reads the values in between, the sign becomes an integer threshold. If it
is a float, and each operation in between is known to be monotone, the sign becomes a
float threshold. Otherwise the sign keeps the float network's comparison.

Operations besides those of `normal` and `signs`:

* `binary`, `conv`, `dense` or `window` with {threshold}: bits of the sums;
* `bits` {threshold}: bits of any value;
* `bitpool` {falls, window, strides, padding}: a max-pool, on the signs of its input.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.ops import Threshold
from xnor_jax.packing import thresholds
from xnor_jax.packing.functions import apply_function
from xnor_jax.packing.normal import (
    Users,
    evaluate,
    make,
    per_channel,
    rewrite,
    transposed,
    users_of,
)
from xnor_jax.packing.thresholds import Evaluation, flip_words
from xnor_jax.packing.trace import Const, Node, live

_RISING = (
    *("tanh", "logistic", "exp", "exp2", "expm1", "erf", "sqrt", "log", "log1p"),
    *("floor", "ceil", "round", "cbrt"),
)
# `f(consts, values [rows, C])`, of each channel on its own.
Chain = Callable[[Any, jax.Array], jax.Array]


def fold_signs(x: Node, output: Node) -> Node:
    """Rewrite each `sign` as a threshold; return the new output."""
    return rewrite(_Fold(output), x, output)


class _Fold:
    def __init__(self, output: Node):
        nodes = live(output)
        self.position = {node: at for at, node in enumerate(nodes)}
        self.users = users_of(nodes, output)

    def __call__(self, sign: Node, users: Users) -> Node:
        if sign.op != "sign":
            return sign
        constant = per_channel(sign.attrs["constant"])
        if constant is None:
            return _compared(sign)
        # From the sign backwards: per-channel functions with max-pools between them.
        segments: list[tuple[Node, Node]] = []
        pools: list[Node] = []
        top, reader = sign.nodes[0], sign
        while True:
            source = self._cut(top)
            segments.append((source, top))
            alone = self._alone(source, top, reader)
            if not (alone and _is_max_pool(source)):
                break
            pools.append(source)
            top, reader = source.nodes[0], source
        segments.reverse()  # from the product to the sign
        pools.reverse()
        chains = [chain(*segment) for segment in segments]
        kind, flip = sign.attrs["kind"], sign.attrs["flip"]

        def function(params, v):
            bound, consts = params
            heads = []
            for (segment, _), c in zip(chains, consts, strict=True):
                v = segment(c, v)
                heads.append(v)
            plus = jnp.logical_xor(apply_function(kind, (v, bound)), flip)
            return Evaluation(heads[:-1], plus, jnp.isnan(v))

        params = (constant, [consts for _, consts in chains])
        if "threshold" in source.attrs:  # its values are signs already
            made = None
        elif source.op == "binary" and alone:
            made = _integer(sign, source, function, params, len(pools))
        else:
            made = self._float(sign, source, function, params, segments, alone)
        if made is None:
            return _compared(sign)
        y, falls = made
        names = [c.sources for s in segments for n in between(*s) for c in n.consts]
        y.sources = y.sources.union(sign.attrs["constant"].sources, *names)
        for pool, fall in zip(pools, falls, strict=True):
            sizes = {
                key: pool.attrs[key][1:-1] for key in ("window", "strides", "padding")
            }
            y = make("bitpool", [y], pool.shape, pool, falls=fall, **sizes)
        return y

    def _cut(self, top: Node) -> Node:
        """The earliest value of which `top` is a per-channel function."""
        current, best = {top}, top
        while True:
            if len(current) == 1:
                (best,) = current
            last = max(current, key=lambda n: self.position.get(n, -1))
            if not _pointwise(last):
                return best
            current.remove(last)
            current.update(last.nodes)

    def _alone(self, source: Node, top: Node, reader: Node) -> bool:
        """Whether no other node reads `source` or a value between it and `reader`."""
        inside = {*between(source, top), reader}
        return all(
            user in inside
            for node in (source, *between(source, top))
            for user in self.users[node]
        )

    def _float(self, sign, source, function, params, segments, alone):
        features = source.shape[-1]
        if source.dtype != np.float32 or len(source.shape) < 2 or features < 1:
            return None
        parts = [slope_of(start, end, features) for start, end in segments]
        if any(slope is None for slope in parts):
            return None
        slopes, total = [], np.ones(features, int)
        for slope in parts[:-1]:
            total = total * slope
            slopes.append(total)
        found = thresholds.float_threshold(
            function, params, features=features, slopes=slopes
        )
        if found is None:
            return None
        sums = source.op in ("conv", "dense")
        pool = source.op == "window" and source.attrs["kind"] == "sum"
        if alone and (sums or (pool and _is_pool(source) and len(source.shape) == 4)):
            attrs = {**source.attrs, "threshold": found.threshold}
            made = make(source.op, source.ins, source.shape, source, **attrs)
        else:
            attrs = {"threshold": found.threshold}
            made = make("bits", [source], source.shape, sign, **attrs)
        return made, found.falls


def _integer(sign, source, function, params, pools):
    kernel, alpha = source.attrs["kernel"], jnp.asarray(source.attrs["alpha"])

    def of_sums(params, sums):
        zero, alpha, rest = params
        return function(rest, _rounded((alpha * sums).astype(source.dtype), zero))

    found = thresholds.integer_threshold(
        of_sums,
        (np.int32(0), alpha, params),
        bound=prod(kernel.shape[:-1]),
        features=kernel.shape[-1],
        pools=pools,
    )
    if found is None:
        return None
    attrs = {**source.attrs, "threshold": found.threshold}
    return make("binary", source.ins, source.shape, source, **attrs), found.falls


def _compared(sign: Node) -> Node:
    """The sign as a `bits` node that makes the float network's own comparison."""
    x, a = sign.nodes[0], sign.attrs
    if x.shape[-1] < 1:
        return _compared_images_first(sign)
    constant = per_channel(a["constant"])
    features, flipped = x.shape[-1], a["flip"]
    if constant is None or len(x.shape) < 2:
        # Not one constant per channel: keep the comparison, and threshold its result.
        ins = [x, a["constant"]]
        held = make("function", ins, x.shape, sign, name=a["kind"])
        held.dtype = np.dtype(bool)
        x = make("function", [held], x.shape, sign, name="to_float")
        bound = np.full(features, 0.5, np.float32)
    else:
        bound = np.broadcast_to(constant.astype(np.float32), (features,))
        if a["kind"] == "gt":  # the negation of −x ≥ −constant
            x = make("function", [x], x.shape, x, name="neg")
            bound, flipped = -bound, not flipped
    flip = flip_words(np.full(features, flipped))
    threshold = Threshold(jnp.asarray(bound), flip)
    made = make("bits", [x], sign.shape, sign, threshold=threshold)
    made.sources = a["constant"].sources
    return made


def _compared_images_first(sign: Node) -> Node:
    """The same where the batch is the last axis, while bits have channels there."""
    x, a = sign.nodes[0], sign.attrs
    if len(x.shape) == 1:  # no channels, so floats: ±(2 · held − 1)
        held = make("function", [x, a["constant"]], x.shape, sign, name=a["kind"])
        held.dtype = np.dtype(bool)
        y = make("function", [held], x.shape, sign, name="to_float")
        one = -1 if a["flip"] else 1
        for name, number in (("mul", 2 * one), ("add", -one)):
            constant = Const(np.asarray(number, np.float32), x.shape)
            y = make("function", [y, constant], x.shape, sign, name=name)
        return y
    order = (len(x.shape) - 1, *range(len(x.shape) - 1))
    attrs = {**a, "constant": transposed(a["constant"], order)}
    turned = transposed(x, order)
    y = _compared(make("sign", [turned], turned.shape, sign, **attrs))
    return transposed(y, (*range(1, len(order)), 0))


def _is_pool(node: Node) -> bool:
    """Whether a window covers spatial axes only and is larger than its padding."""
    a = node.attrs
    edges = all(a[key][at] == 1 for key in ("window", "strides") for at in (0, -1))
    pads = zip(a["window"], a["padding"], strict=True)
    return (
        edges
        and a["padding"][0] == a["padding"][-1] == (0, 0)
        and 3 <= len(node.shape) <= 5
        and all(max(p) < k for k, p in pads)
    )


def _is_max_pool(node: Node) -> bool:
    return node.op == "window" and node.attrs["kind"] == "max" and _is_pool(node)


def _pointwise(node: Node) -> bool:
    """Whether a node is a function of values of its shape and per-channel constants."""
    return node.op == "function" and all(
        i.shape == node.shape if isinstance(i, Node) else per_channel(i) is not None
        for i in node.ins
    )


def between(source: Node, top: Node) -> list[Node]:
    """The nodes after `source` up to `top`, operands first."""
    return live(top, [source])


def chain(source: Node, top: Node) -> tuple[Chain, Any]:
    """The function `f(params, values [rows, C])` to `top`, with its parameters.

    Each operation rounds its result, as where the operations run one by one.
    """
    nodes = between(source, top)
    consts = [
        [per_channel(i) if isinstance(i, Const) else None for i in node.ins]
        for node in nodes
    ]

    def function(params, v):
        zero, consts = params
        values = {source: v}
        for node, own in zip(nodes, consts, strict=True):
            args = [
                values[i] if isinstance(i, Node) else c
                for i, c in zip(node.ins, own, strict=True)
            ]
            values[node] = _rounded(evaluate(node, args), zero)
        return values[top]

    return function, (np.int32(0), consts)


def _rounded(value: jax.Array, zero: jax.Array) -> jax.Array:
    """Return `value`, rounded to its dtype: it takes no part in a fused multiply-add.

    XLA computes `α · n + bias` in one program with one rounding, which hides an exact
    0. An optimization barrier does not prevent that; an exclusive or with a zero that
    is an argument of the program does.
    """
    if value.dtype != jnp.float32:
        return value
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) ^ zero
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def slope_of(source: Node, top: Node, features: int) -> np.ndarray | None:
    """Per channel 1 if `top` rises with `source`, −1 if it falls, 0 if it is constant.

    None if that is not known.
    """
    slopes: dict[Node, np.ndarray] = {source: np.ones(features, int)}
    for node in between(source, top):
        if node.dtype != np.float32:
            return None
        slope = _slope(node, slopes, features)
        if slope is None:
            return None
        slopes[node] = slope
    return slopes[top]


def _slope(node, slopes, features) -> np.ndarray | None:
    name = node.attrs["name"]
    ins = [
        slopes[i] if isinstance(i, Node) else np.zeros(features, int) for i in node.ins
    ]
    if name in ("add", "max", "min", "clamp"):
        return _agreeing(ins)
    if name == "sub":
        return _agreeing([ins[0], -ins[1]])
    if name == "neg":
        return -ins[0]
    if name in _RISING:
        return ins[0]
    if name in ("mul", "div"):
        constants = [(at, i) for at, i in enumerate(node.ins) if isinstance(i, Const)]
        if len(constants) != 1:
            return None
        ((at, constant),) = constants
        factor = per_channel(constant)
        if factor is None or (name == "div" and at != 1):
            return None
        factor = np.broadcast_to(factor, features)
        if not np.isfinite(factor).all() or (name == "div" and (factor == 0).any()):
            return None
        return ins[1 - at] * np.sign(factor).astype(int)
    return None


def _agreeing(slopes: list[np.ndarray]) -> np.ndarray | None:
    """The slope of a sum; None if in some channel one term rises and another falls."""
    both = np.stack(slopes)
    if ((both > 0).any(0) & (both < 0).any(0)).any():
        return None
    return np.sign(both.sum(0))
