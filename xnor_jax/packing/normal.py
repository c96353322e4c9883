"""Normalization of a traced graph: JAX's primitives become a few operations.

A pool may be a `reduce_window` or a maximum of shifted slices, a dense layer any
`dot_general`, an image channels first or last. Each becomes one operation with the
channels last; transposes and reshapes move towards the output until they cancel. Only
this module, `trace` and `exact` depend on the names of JAX's primitives.

Operations and their attributes; axis 0 is the batch, `conv` lists spatial axes alone:

* `input`; `function` {name, exponent, dtype}, elementwise;
* `conv` {kernel, strides, padding, dilation, groups, sources}; `dense` {kernel,
  sources}; `matmul` of two values;
* `window` {kind, window, strides, padding}; `reduce` {kind, axes};
* `reshape`; `transpose` {order}; `broadcast`; `slice` {start, stop, strides};
  `pad` {padding, value}; `concat` {axis}; `take` {indices}.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.packing.functions import FUNCTIONS, apply_function
from xnor_jax.packing.trace import BATCH_SIZES, Const, Node, PackError, compact, live

Users = dict[Node, list[Node | None]]
RewriteRule = Callable[[Node, Users], Node]

_IDENTITIES = (
    *("copy", "stop_gradient", "optimization_barrier", "pvary"),
    *("sharding_constraint", "reshard"),
)
# Primitive to function, where the names differ.
_RENAMED = {"select_n": "select", "add_any": "add"}
# The settings that an elementwise primitive may have; "y" is an exponent.
_FUNCTION_SETTINGS = {"y", "accuracy", "rounding_method", "out_dtype"}
_TO_EVEN = jax.lax.RoundingMethod.TO_NEAREST_EVEN
_WINDOWS = ("window", "strides", "padding", "start", "stop")


def translate(x: Node, output: Node) -> Node:
    """Rewrite a graph of primitives as one of the operations above, normalized.

    Raises:
      PackError: If a primitive or its use is not supported; the message names it and
        its line.
    """
    return normalize(x, rewrite(_translate, x, output))


def normalize(x: Node, output: Node) -> Node:
    """Find pools and move transposes and reshapes towards the output."""
    for _ in range(100):
        changed = False
        for rule in (_simplify, _max_of_slices, _sum_of_slices, _push):
            output, moved = rewrite_once(rule, x, output)
            changed |= moved
        if not changed:
            break
    return output


def rewrite(rule: RewriteRule, x: Node, output: Node) -> Node:
    """Apply a rule to every node once, operands first."""
    return rewrite_once(rule, x, output)[0]


def rewrite_once(rule: RewriteRule, x: Node, output: Node) -> tuple[Node, bool]:
    """Apply a rule as `rewrite` does; also return whether anything changed."""
    done, changed = {x: x}, False
    nodes = live(output)
    users = users_of(nodes, output)
    for node in nodes:
        if node is x:
            continue
        node.ins = [done[i] if isinstance(i, Node) else i for i in node.ins]
        made = rule(node, users)
        changed |= made is not node
        done[node] = made
        if made is not node:
            users[made] = users[node]
    return done[output], changed


def users_of(nodes: Sequence[Node], output: Node) -> Users:
    """The users of each node; None stands for the user of the output."""
    users: Users = defaultdict(list)
    for node in nodes:
        for operand in node.nodes:
            users[operand].append(node)
    users[output].append(None)
    return users


def evaluate(node: Node, args: Sequence[Any]) -> jax.Array:
    """Evaluate a `function` node on arrays."""
    name = node.attrs["name"]
    if name == "convert":
        return jnp.asarray(args[0]).astype(node.attrs["dtype"])
    return apply_function(name, args, node.attrs.get("exponent", 0))


def is_function_of_two(node: Node | None, name: str) -> bool:
    """Whether a node is the function `name` of two values, neither of them constant."""
    return (
        node is not None
        and node.op == "function"
        and node.attrs["name"] == name
        and len(node.nodes) == 2
    )


def per_channel(const: Const) -> np.ndarray | None:
    """A constant as `[C]` or `[1]`; None if it varies along another axis."""
    value = const.value
    if value.size == 1 or (value.ndim and value.size == value.shape[-1]):
        return value.reshape(-1)
    return None


# Constructors of nodes.


def make(op: str, ins: Sequence[Any], shape: Sequence[int], like: Node, **attrs: Any):
    """Make a node with the dtype and location of the node `like`."""
    made = Node(op, list(ins), attrs, tuple(shape), like.dtype, like.where, like.line)
    made.sources = like.sources if like.op == op else frozenset()
    made.primitive = like.primitive
    return made


def reshaped(x: Node, shape: Sequence[int]) -> Node:
    """`x` in another shape."""
    shape = tuple(shape)
    if x.op == "reshape" or (
        x.op == "transpose" and _moves_ones(x.nodes[0].shape, x.attrs["order"])
    ):
        return reshaped(x.nodes[0], shape)
    if shape[:2] == (1, -1) and x.shape[:1] == (-1,):
        # The batch stays first in a reshape; a transpose puts an axis before it.
        y = reshaped(x, (-1, 1, *shape[2:]))
        return transposed(y, (1, 0, *range(2, len(shape))))
    return x if x.shape == shape else make("reshape", [x], shape, x)


def transposed(x: Any, order: Sequence[int]) -> Any:
    """`x`, a node or a constant, with its axes in another order."""
    order = tuple(map(int, order))
    if isinstance(x, Const):
        if not x.value.ndim:  # it stands for any shape
            return x
        shape = tuple(x.shape[p] for p in order)
        return Const(x.value.transpose(order), shape, x.sources)
    swap = (1, 0, *range(2, len(order)))
    if order == swap and x.shape[:2] == (-1, 1):
        return make("transpose", [x], (1, -1, *x.shape[2:]), x, order=order)
    if x.op == "transpose":
        order, x = tuple(x.attrs["order"][p] for p in order), x.nodes[0]
    if order == tuple(range(len(order))):
        return x
    shape = tuple(x.shape[p] for p in order)
    if shape[:2] == (1, -1):  # the batch first, then one axis before it
        return transposed(transposed(x, [order[p] for p in swap]), swap)
    if _moves_ones(x.shape, order) and x.shape[0] == shape[0]:
        return reshaped(x, shape)
    return make("transpose", [x], shape, x, order=order)


def _moves_ones(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a transpose moves only axes of size 1."""
    wide = [p for p in order if shape[p] != 1]
    return wide == sorted(wide)


def _pairs(padding: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(low), int(high)) for low, high in padding)


def _size(shape: Sequence[int]) -> int:
    return prod(abs(d) for d in shape)


def refuse(node: Node, why: str) -> PackError:
    """An error that names the node's primitive and location."""
    what = node.primitive or node.op
    return PackError(f"pack: {what} {node.place}: {why}".replace(" :", ":"))


# Translation of single primitives.


def _translate(node: Node, users: Users) -> Node:
    op, a = node.op, node.attrs
    x: Any = node.ins[0]
    if op in _IDENTITIES:
        return x
    if op == "convert_element_type":
        return _convert(node)
    if op == "squeeze":
        return reshaped(x, node.shape)
    if op == "reshape":
        if a.get("dimensions") not in (None, ()):
            raise refuse(node, "expected a reshape without dimensions; transpose first")
        return reshaped(x, node.shape)
    if op == "transpose":
        return transposed(x, a["permutation"])
    if op == "broadcast_in_dim":
        wide = [1] * len(node.shape)
        for at, d in zip(a["broadcast_dimensions"], x.shape, strict=True):
            wide[int(at)] = d
        y = reshaped(x, wide)
        return y if y.shape == node.shape else make("broadcast", [y], node.shape, node)
    if op == "conv_general_dilated":
        return _conv(node)
    if op == "dot_general":
        return _dot(node)
    if op in ("reduce_window_max", "reduce_window_min", "reduce_window_sum"):
        if any(d != 1 for d in (*a["base_dilation"], *a["window_dilation"])):
            raise refuse(node, "expected a window without dilation")
        sizes = (a["window_dimensions"], a["window_strides"], _pairs(a["padding"]))
        return _window(x, op[-3:], *sizes, node)
    if op in ("reduce_sum", "reduce_max", "reduce_min"):
        axes = tuple(map(int, a["axes"]))
        return make("reduce", [x], node.shape, node, kind=op[-3:], axes=axes)
    if op == "concatenate":
        return _concat(node, node.ins, int(a["dimension"]))
    if op == "stack":
        axis = int(a["axis"])
        wide = (*node.shape[:axis], 1, *node.shape[axis + 1 :])
        parts = [
            reshaped(i, wide)
            if isinstance(i, Node)
            else Const(np.expand_dims(i.value, axis), wide, i.sources)
            for i in node.ins
        ]
        return _concat(node, parts, axis)
    if op == "tile":
        for axis, count in enumerate(a["reps"]):
            if count > 1:
                shape = list(x.shape)
                shape[axis] *= int(count)
                x = make("concat", [x] * int(count), shape, node, axis=axis)
        return x
    if op in ("split", "unstack"):
        axis, at = int(a["axis"]), a["result"]
        sizes = list(map(int, a.get("sizes", [1] * x.shape[axis])))
        start, stop, shape = [0] * len(x.shape), list(x.shape), list(x.shape)
        start[axis], shape[axis] = sum(sizes[:at]), sizes[at]
        stop[axis] = start[axis] + sizes[at]
        y = _slice(x, start, stop, [1] * len(start), shape, node)
        return reshaped(y, node.shape)
    if op == "slice":
        strides = a["strides"] or (1,) * len(node.shape)
        start, stop = a["start_indices"], a["limit_indices"]
        return _slice(x, start, stop, strides, node.shape, node)
    if op == "pad":
        return _pad(node)
    if op == "dynamic_slice" and all(isinstance(i, Const) for i in node.ins[1:]):
        return _dynamic_slice(node)
    if op in ("gather", "rev", "dynamic_slice"):
        return _take(node)
    name = _RENAMED.get(op, op)
    if op in ("eq", "ne") and x.dtype == np.bool_:
        differ = make("function", node.ins, node.shape, node, name="xor")
        same = make("function", [differ], node.shape, node, name="not")
        return differ if op == "ne" else same
    if name in FUNCTIONS:
        given = {key for key, value in a.items() if value is not None}
        if unknown := sorted(given - _FUNCTION_SETTINGS):
            raise refuse(node, f"the setting {unknown[0]} is not supported")
        if a.get("rounding_method", _TO_EVEN) != _TO_EVEN:
            raise refuse(node, "expected halves rounded to even, as by jnp.round")
        exponent = int(a["y"]) if name == "integer_pow" else 0
        if name == "select" and node.ins[0].dtype != np.bool_:
            raise refuse(
                node,
                "expected a boolean condition; use jnp.where instead of a lax.cond or "
                "lax.switch under vmap",
            )
        attrs = {"name": name, "exponent": exponent}
        return make("function", node.ins, node.shape, node, **attrs)
    if op == "reduce_window":
        raise refuse(
            node,
            "expected a pool that starts from the identity of its function: -jnp.inf "
            "for lax.max, jnp.inf for lax.min, 0 for lax.add",
        )
    others = ("reduce", "arg", "scatter", "sort", "cum")
    functions = "; xnor_jax.packing.functions lists the elementwise functions"
    raise PackError(
        f"pack: the primitive {op} {node.place} is not supported in a packed network"
        f"{'' if op.startswith(others) else functions}"
    )


def _convert(node: Node) -> Node:
    x, dtype = node.nodes[0], np.dtype(node.attrs["new_dtype"])
    if dtype == x.dtype:
        return x
    if x.dtype == np.bool_ and dtype == np.float32:
        return make("function", [x], node.shape, node, name="to_float")
    return make("function", [x], node.shape, node, name="convert", dtype=dtype)


def _conv(node: Node) -> Node:
    a, (x, kernel) = node.attrs, node.ins
    if not isinstance(x, Node) or not isinstance(kernel, Const):
        raise refuse(node, "expected a kernel that does not depend on the input")
    if a["batch_group_count"] != 1 or any(d != 1 for d in a["lhs_dilation"]):
        raise refuse(
            node, "transposed convolutions and batch_group_count are not supported"
        )
    lhs, rhs, out = (tuple(map(int, spec)) for spec in a["dimension_numbers"])
    rank = len(lhs) - 2
    if rank > 3:
        raise refuse(node, f"expected at most 3 spatial axes, got {rank}")
    y = transposed(x, (lhs[0], *lhs[2:], lhs[1]))
    axes = (out[0], *out[2:], out[1])
    shape = [node.shape[axis] for axis in axes]
    made = make(
        "conv",
        [y],
        shape,
        node,
        kernel=kernel.full().transpose(*rhs[2:], rhs[1], rhs[0]),
        strides=tuple(map(int, a["window_strides"])),
        padding=_pairs(a["padding"]),
        dilation=tuple(map(int, a["rhs_dilation"])),
        groups=int(a["feature_group_count"]),
        sources=kernel.sources,
    )
    return transposed(made, np.argsort(axes).tolist())


def _concat(node: Node, parts: Sequence[Node | Const], axis: int) -> Node:
    """The parts along an axis; along one before the batch, they are transposed."""
    if axis or node.shape[1:2] != (-1,):
        return make("concat", parts, node.shape, node, axis=axis)
    order = (1, 0, *range(2, len(node.shape)))
    turned = [transposed(i, order) for i in parts]
    shape = tuple(node.shape[d] for d in order)
    return transposed(make("concat", turned, shape, node, axis=1), order)


def _dot(node: Node) -> Node:
    (left, right), batch = node.attrs["dimension_numbers"]
    a, b = node.ins
    if isinstance(a, Node) and isinstance(b, Node):
        return _matmul(node, a, b, left, right, *batch)
    if any(map(len, batch)):  # a kernel per head, say
        raise refuse(
            node,
            "expected a kernel that is the same for all rows, got one with batch axes; "
            "write it as a convolution with feature_group_count",
        )
    first = isinstance(a, Node)
    x_axes, k_axes = (left, right) if first else (right, left)
    (x,), (kernel,) = node.nodes, node.consts
    kept = [d for d in range(len(x.shape)) if d not in x_axes]
    free = sorted(kept, key=lambda d: x.shape[d] >= 0)  # the batch first
    k_free = [d for d in range(len(kernel.shape)) if d not in k_axes]
    rows = [x.shape[d] for d in free]
    matrix = kernel.full().transpose(*k_axes, *k_free)
    matrix = matrix.reshape(_size([x.shape[d] for d in x_axes]), -1)
    y = reshaped(transposed(x, (*free, *x_axes)), (*rows, len(matrix)))
    shape = (*rows, matrix.shape[1])
    y = make("dense", [y], shape, node, kernel=matrix, sources=kernel.sources)
    y = reshaped(y, (*rows, *(kernel.shape[d] for d in k_free)))
    order = [free.index(d) for d in kept]
    others = range(len(rows), len(y.shape))
    return transposed(y, (*order, *others) if first else (*others, *order))


def _matmul(node, a, b, a_axes, b_axes, a_batch, b_batch) -> Node:
    def arranged(x, contracted, batch, contracted_last):
        free = [
            d for d in range(len(x.shape)) if d not in contracted and d not in batch
        ]
        parts = (free, contracted) if contracted_last else (contracted, free)
        y = transposed(x, (*batch, *parts[0], *parts[1]))
        sizes = [_signed([x.shape[d] for d in part]) for part in parts]
        lead = [x.shape[d] for d in batch]
        return reshaped(y, (*lead, *sizes)), [x.shape[d] for d in free], lead

    left, a_free, lead = arranged(a, list(a_axes), list(a_batch), True)
    right, b_free, _ = arranged(b, list(b_axes), list(b_batch), False)
    if not lead:
        raise refuse(node, "multiplies images of the batch with each other")
    shape = (*lead, left.shape[-2], right.shape[-1])
    return reshaped(make("matmul", [left, right], shape, node), node.shape)


def _signed(shape: Sequence[int]) -> int:
    """The number of entries, negative if it is a multiple of the batch size."""
    return -_size(shape) if any(d < 0 for d in shape) else _size(shape)


def _slice(x: Node, start, stop, strides, shape, node: Node) -> Node:
    if tuple(shape) == x.shape:
        return x
    start, stop, strides = (tuple(map(int, v)) for v in (start, stop, strides))
    attrs = {"start": start, "stop": stop, "strides": strides}
    return make("slice", [x], shape, node, **attrs)


def _dynamic_slice(node: Node) -> Node:
    """A `dynamic_slice` with constant starts as a `slice`."""
    (x,), starts = node.nodes, node.consts
    sizes = node.attrs["original"]["slice_sizes"]
    start, stop = [], []
    for d, size, size_out, at in zip(x.shape, sizes, node.shape, starts, strict=True):
        whole = size_out == d
        first = 0 if whole else int(np.clip(int(at.value), 0, d - size))
        start.append(first)
        stop.append(d if whole else first + size)
    return _slice(x, start, stop, [1] * len(start), node.shape, node)


def _pad(node: Node) -> Node:
    x, value = node.ins
    config = [tuple(map(int, c)) for c in node.attrs["padding_config"]]
    if not isinstance(x, Node) or not isinstance(value, Const):
        raise refuse(node, "expected the input padded with a constant")
    if any(inside for _, _, inside in config) or min(min(c) for c in config) < 0:
        raise refuse(node, "negative and interior padding are not supported")
    padding = tuple((low, high) for low, high, _ in config)
    if not any(map(any, padding)):
        return x
    if padding[0] != (0, 0) and x.shape[0] < 0:
        raise refuse(node, "pads the batch axis")
    number = float(value.value.reshape(()))
    return make("pad", [x], node.shape, node, padding=padding, value=number)


def _take(node: Node) -> Node:
    """A gather with constant indices as `take`, found by evaluating it on `arange`."""
    x, others = node.ins[0], node.consts
    if not isinstance(x, Node) or len(node.nodes) > 1:
        raise refuse(node, "expected indices that do not depend on the input")
    n = BATCH_SIZES[0]  # `original` is of the first trace
    if x.shape[0] != -1 or node.shape[:1] != (-1,):
        raise refuse(node, "expected the batch as the first axis")

    def known(shape):
        return tuple(-d * n if d < 0 else d for d in shape)

    size = _size(x.shape[1:])
    indices = np.arange(n * size, dtype=np.int32).reshape(known(x.shape))
    primitive, params = node.attrs["primitive"], node.attrs["original"]
    with jax.ensure_compile_time_eval():
        args = [jnp.asarray(np.broadcast_to(i.value, known(i.shape))) for i in others]
        found = np.asarray(primitive.bind(jnp.asarray(indices), *args, **params))
    if (
        not (0 <= found[0].min() and found[0].max() < size)
        or not (found[1] == found[0] + size).all()
    ):
        raise refuse(node, "indexes another image of the batch, or out of range")
    return make("take", [x], node.shape, node, indices=found[0])


def _window(x: Node, kind: str, window, strides, padding, like: Node) -> Node:
    window, strides = tuple(map(int, window)), tuple(map(int, strides))
    shape = tuple(
        d if k == s == 1 and pads == (0, 0) else (d + sum(pads) - k) // s + 1
        for d, k, s, pads in zip(x.shape, window, strides, padding, strict=True)
    )
    if x.op == "reshape" and len(x.nodes[0].shape) < len(x.shape):
        # Axes of size 1 that `vmap` or a library inserted.
        inner, keep, at = x.nodes[0], [], 0
        for axis, d in enumerate(x.shape):
            if at < len(inner.shape) and inner.shape[at] == d:
                keep.append(axis)
                at += 1
            elif not d == window[axis] == 1:
                break
        # A window over the last axis keeps a channel axis of size 1 after it.
        if at == len(inner.shape) == len(keep) and window[keep[-1]] == 1:
            k, s, p = ([v[i] for i in keep] for v in (window, strides, padding))
            return reshaped(_window(inner, kind, k, s, p, like), shape)
    if x.op == "window" and x.attrs["kind"] == kind != "sum":
        both = []
        b = x.attrs
        for k, s, p, k2, s2, p2 in zip(
            *(window, strides, padding, b["window"], b["strides"], b["padding"]),
            strict=True,
        ):
            if k2 == s2 == 1 and p2 == (0, 0):
                both.append((k, s, p))
            elif k == s == 1 and p == (0, 0):
                both.append((k2, s2, p2))
        if len(both) == len(window):
            k, s, p = zip(*both, strict=True)
            return _window(x.nodes[0], kind, k, s, p, like)
    outside = {"max": -np.inf, "min": np.inf, "sum": 0.0}[kind]
    if x.op == "pad" and x.attrs["value"] == outside:
        pads = zip(padding, x.attrs["padding"], strict=True)
        both = tuple((p[0] + q[0], p[1] + q[1]) for p, q in pads)
        # Padding of an axis that this window does not cover is left to the next one.
        if all(max(pad) < k for k, pad in zip(window, both, strict=True)):
            return _window(x.nodes[0], kind, window, strides, both, like)
    if window[-1] != 1:
        wide = reshaped(x, (*x.shape, 1))
        sizes = (*window, 1), (*strides, 1), (*padding, (0, 0))
        return reshaped(_window(wide, kind, *sizes, like), shape)
    attrs = {"kind": kind, "window": window, "strides": strides}
    return make("window", [x], shape, like, **attrs, padding=tuple(padding))


# Rules for several nodes.


def _simplify(node: Node, users: Users) -> Node:
    """Merge a node with its operand if rewriting the operand made that possible."""
    a, made = node.attrs, node
    if node.op == "reshape":
        made = reshaped(node.nodes[0], node.shape)
    if node.op == "transpose":
        made = transposed(node.nodes[0], a["order"])
    if node.op == "window" and node.nodes[0].op in ("pad", "window", "reshape"):
        sizes = (a["window"], a["strides"], a["padding"])
        made = _window(node.nodes[0], a["kind"], *sizes, node)
    return node if made.op == node.op and made.ins == node.ins else made


def _max_of_slices(node: Node, users: Users) -> Node:
    """Rewrite a maximum of shifted slices as a max-pool along one axis."""

    def leaves(n: Node) -> list[Node]:
        found = []
        for operand in n.nodes:
            inside = is_function_of_two(operand, "max") and len(users[operand]) == 1
            found += leaves(operand) if inside else [operand]
        return found

    # Only the outermost maximum is rewritten, since it has all the slices.
    below = users[node]
    if not is_function_of_two(node, "max"):
        return node
    if len(below) == 1 and is_function_of_two(below[0], "max"):
        return node
    cuts = []
    for leaf in leaves(node):
        if leaf.op == "slice":
            x, a = leaf.nodes[0], leaf.attrs
            cuts.append((x, a["start"], a["strides"]))
        else:
            rank = len(leaf.shape)
            cuts.append((leaf, (0,) * rank, (1,) * rank))
    x, _, strides = cuts[0]
    if any(c[0] is not x or c[2] != strides for c in cuts):
        return node
    starts = np.array([start for _, start, _ in cuts])
    axes = np.flatnonzero((starts != starts[0]).any(0))
    if len(axes) != 1:
        return node
    axis, others = int(axes[0]), [d for d in range(len(strides)) if d != axes[0]]
    taps, stride = len(cuts), strides[axis]
    whole = all(strides[d] == 1 and node.shape[d] == x.shape[d] for d in others)
    if sorted(starts[:, axis]) != list(range(taps)) or not whole:
        return node
    if axis == 0 or (x.shape[axis] - taps) // stride + 1 != node.shape[axis]:
        return node
    window, steps = [1] * len(strides), [1] * len(strides)
    window[axis], steps[axis] = taps, stride
    return _window(x, "max", window, steps, _no_padding(window), node)


def _sum_of_slices(node: Node, users: Users) -> Node:
    """Rewrite shifted slices, added in row-major order, as a window's sum."""
    below = users[node]
    if not is_function_of_two(node, "add"):
        return node
    if len(below) == 1 and is_function_of_two(below[0], "add"):
        return node
    cuts: list[Node] = []
    left = node
    while is_function_of_two(left, "add") and (left is node or len(users[left]) == 1):
        left, last = left.nodes
        cuts.insert(0, last)
    cuts.insert(0, left)
    if any(cut.op != "slice" or cut.nodes[0] is not cuts[0].nodes[0] for cut in cuts):
        return node
    x, strides = cuts[0].nodes[0], cuts[0].attrs["strides"]
    starts = [cut.attrs["start"] for cut in cuts]
    window = [len(set(along)) for along in zip(*starts, strict=True)]
    if any(cut.attrs["strides"] != strides for cut in cuts) or window[0] != 1:
        return node
    if starts != list(np.ndindex(*window)):
        return node
    x, padding = _no_negative_zero(x), _no_padding(window)
    made = _window(x, "sum", window, strides, padding, node)
    return made if made.shape == node.shape else node


def _no_padding(window: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return ((0, 0),) * len(window)


def _no_negative_zero(x: Node) -> Node:
    """Strip the `where(x == 0, 0, x)` that precedes a window's sum."""
    if x.op == "pad" and x.attrs["value"] == 0:
        inner = _no_negative_zero(x.nodes[0])
        return x if inner is x.nodes[0] else make("pad", [inner], x.shape, x, **x.attrs)
    if x.op != "function" or x.attrs["name"] != "select" or len(x.nodes) != 2:
        return x
    which, value = x.nodes
    zero = x.ins[2]
    if not isinstance(zero, Const) or zero.value.any() or which.op != "function":
        return x
    compared = which.consts
    if which.attrs["name"] != "eq" or which.nodes != [value] or compared[0].value.any():
        return x
    return value


def _push(node: Node, users: Users) -> Node:
    """Move an operand's transpose, reshape or zero padding past or into the node."""
    if not node.nodes:
        return node
    x = node.nodes[0]
    if x.op == "transpose":
        return _push_transpose(node, x)
    if x.op == "reshape":
        return _push_reshape(node, x)
    if node.op == "dense" and x.op == "conv":
        return _of_patches(node, x)
    if node.op == "conv" and x.op == "pad" and x.attrs["value"] == 0:
        pads = x.attrs["padding"]
        if pads[0] == pads[-1] == (0, 0):
            both = zip(node.attrs["padding"], pads[1:-1], strict=True)
            padding = tuple((p[0] + q[0], p[1] + q[1]) for p, q in both)
            attrs = node.attrs | {"padding": padding}
            return make("conv", x.ins, node.shape, node, **attrs)
    return node


def _of_patches(node: Node, x: Node) -> Node:
    """A dense layer on the patches that a convolution extracts, as a convolution.

    `lax.conv_general_dilated_patches` is a convolution with a kernel of ones and zeros.
    """
    picks, matrix, a = x.attrs["kernel"], node.attrs["kernel"], x.attrs
    *window, each, features = picks.shape
    channels = each * a["groups"]
    if features != prod(window) * channels or len(node.shape) != len(x.shape):
        return node
    *place, within, out = np.nonzero(picks)
    whole = len(out) == features and (picks[(*place, within, out)] == 1).all()
    first = out // (features // a["groups"]) * each
    rows = np.ravel_multi_index((*place, first + within), (*window, channels))
    if not whole or len(np.unique(out)) != features or len(np.unique(rows)) != features:
        return node
    kernel = np.empty_like(matrix)
    kernel[rows] = matrix[out]
    attrs = {
        "kernel": kernel.reshape(*window, channels, -1),
        "groups": 1,
        "sources": node.attrs["sources"],
    }
    return make("conv", x.ins, node.shape, node, **{**a, **attrs})


def _push_transpose(node: Node, x: Node) -> Node:
    order, inner = x.attrs["order"], x.nodes[0]
    inverse = [int(i) for i in np.argsort(order)]
    shape = [node.shape[i] for i in inverse] if len(node.shape) == len(order) else []
    alike = all(i.op == "transpose" and i.attrs["order"] == order for i in node.nodes)
    if node.op == "function" and alike:
        ins = [transposed(i, inverse) for i in node.ins]
        return transposed(make("function", ins, shape, node, **node.attrs), order)
    if node.op == "concat" and alike:
        axis = int(order[node.attrs["axis"]])
        ins = [transposed(i, inverse) for i in node.ins]
        return transposed(make("concat", ins, shape, node, axis=axis), order)
    if node.op in ("window", "pad", "slice", "broadcast"):
        attrs = {
            key: tuple(value[i] for i in inverse) if key in _WINDOWS else value
            for key, value in node.attrs.items()
        }
        return transposed(make(node.op, [inner], shape, node, **attrs), order)
    if node.op == "reduce":
        axes = tuple(sorted(order[d] for d in node.attrs["axes"]))
        left = [p for d, p in enumerate(order) if d not in node.attrs["axes"]]
        rank = {p: r for r, p in enumerate(sorted(left))}
        sizes = [inner.shape[p] for p in sorted(left)]
        y = make("reduce", [inner], sizes, node, kind=node.attrs["kind"], axes=axes)
        return transposed(y, [rank[p] for p in left])
    return node


def _push_reshape(node: Node, x: Node) -> Node:
    inner = x.nodes[0]
    if node.op == "dense" and inner.op == "transpose" and len(x.shape) == 2:
        # An image flattened with channels first: permute the kernel's rows instead.
        order, image = inner.attrs["order"], inner.nodes[0]
        if inner.shape[0] == x.shape[0] and order[0] == 0:
            matrix = node.attrs["kernel"]
            kernel = matrix.reshape(*inner.shape[1:], -1)
            axes = [int(p) - 1 for p in np.argsort(order)][1:]
            kernel = kernel.transpose(*axes, len(axes)).reshape(matrix.shape)
            attrs = {**node.attrs, "kernel": kernel}
            return make("dense", [reshaped(image, x.shape)], node.shape, node, **attrs)
    if inner.shape[:1] != (-1,):
        return node
    rows = x.shape[0] != -1  # axis 0 merges the batch with other axes
    if node.op == "dense" and rows:
        if inner.shape[-1] != x.shape[-1]:
            inner = reshaped(inner, (-1, -x.shape[0], *x.shape[1:]))
        shape = (*inner.shape[:-1], node.shape[-1])
        return reshaped(make("dense", [inner], shape, node, **node.attrs), node.shape)
    if node.op == "function" and x.shape == node.shape:
        others = [i for i in node.nodes if i is not x]
        if any(i.op != "reshape" or i.nodes[0].shape != inner.shape for i in others):
            return node
        ins = [
            i.nodes[0]
            if isinstance(i, Node)
            else _const_reshaped(i, x.shape, inner.shape)
            for i in node.ins
        ]
        if None in ins:
            return node
        y = make("function", ins, inner.shape, node, **node.attrs)
        return reshaped(y, node.shape)
    return node


def _const_reshaped(const: Const, old: Sequence[int], new: Sequence[int]):
    """A constant operand reshaped from `old` to `new`; None if that is not possible."""
    value = const.value
    if value.size == 1:
        return Const(value.reshape(()), (), const.sources)
    if value.size == value.shape[-1] == new[-1] and old[-1] == new[-1]:
        shape = (*(1,) * (len(new) - 1), new[-1])
        return Const(value.reshape(shape), tuple(new), const.sources)
    if old[0] == new[0] == -1 and value.shape[0] == 1:
        full = np.broadcast_to(value, (1, *old[1:])).reshape(1, *new[1:])
        return Const(compact(full), tuple(new), const.sources)
    return None
