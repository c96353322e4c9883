"""Lowering of a traced function to the nodes of a packed network."""

from collections.abc import Iterable
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from xnor_jax import ops
from xnor_jax.packing import checks, graph
from xnor_jax.packing.folding import fold_signs
from xnor_jax.packing.graph import AFFINE, RELU, THRESHOLD, Spec
from xnor_jax.packing.normal import (
    Users,
    make,
    normalize,
    per_channel,
    refuse,
    rewrite,
    translate,
)
from xnor_jax.packing.signs import check_coverage, find_products, find_signs
from xnor_jax.packing.thresholds import flip_words
from xnor_jax.packing.trace import Const, Node, PackError, Trace, live

_PRODUCTS = ("binary", "conv", "dense")
_SPATIAL = ("window", "strides", "padding")


def lower(traced: Trace, masked: Iterable[str] = ()) -> tuple[graph.Node, ...]:
    """Lower a traced function to the nodes of a packed network.

    Args:
      traced: The function's graph.
      masked: Paths of the kernels that must be in a product of signs.

    Raises:
      PackError: If an operation cannot be packed; the message gives its location.
    """
    x, output = traced.input, traced.output
    output = translate(x, output)
    _check_constants(output)
    output = find_signs(x, output)
    output = normalize(x, output)
    output = find_products(x, output)
    output = normalize(x, output)
    check_coverage(output, frozenset(masked))
    output = fold_signs(x, output)
    for rule in (_absorb, _fuse_norm):
        output = rewrite(rule, x, output)
    output = rewrite(_FuseMean(output), x, output)
    return _Emitter(traced.parameters).run(x, output)


def _check_constants(output: Node) -> None:
    for node in live(output):
        for const in node.consts:
            floating = np.issubdtype(const.dtype, np.floating)
            if floating and np.isnan(const.value).any():
                names = ", ".join(sorted(const.sources)[:3])
                origin = f" computed from {names}" if names else ""
                raise refuse(node, f"the constant{origin} contains NaN")


# Chains of operations that become one node.


def _operands(node: Node, name: str) -> tuple[Node, np.ndarray, Const] | None:
    """The value and per-channel constant of a function `name` of the two; else None."""
    if node.op != "function" or node.attrs["name"] != name or len(node.ins) != 2:
        return None
    consts = node.consts
    if len(consts) != 1 or node.nodes[0].shape != node.shape or not node.shape[1:]:
        return None
    constant = per_channel(consts[0])
    if constant is None or (name == "sub" and node.ins[1] is not consts[0]):
        return None
    return node.nodes[0], np.broadcast_to(constant, node.shape[-1:]), consts[0]


def _absorbed(product: Node, node: Node, const: Const, **attrs: Any) -> Node:
    made = make(
        product.op, product.ins, node.shape, product, **{**product.attrs, **attrs}
    )
    made.sources |= const.sources
    return made


def _is_open(node: Node, users: Users, *taken: str) -> bool:
    """Whether a float32 product has one user and no threshold, ReLU or `taken` yet."""
    return (
        node.op in _PRODUCTS
        and len(users[node]) == 1
        and node.dtype == np.float32
        and not {"threshold", "relu", *taken} & node.attrs.keys()
    )


def _absorb(node: Node, users: Users) -> Node:
    """Absorb α, a bias and a ReLU, or after a real product a scale and a shift, too.

    They are computed in the network's order, so that the rounding is the same.
    """
    if found := _operands(node, "mul"):
        product, constant, const = found
        if product.op == "binary":
            alone = (product.attrs["alpha"] == 1).all()
            if alone and _is_open(product, users, "bias"):
                return _absorbed(product, node, const, alpha=constant)
        elif _is_open(product, users, "scale") and np.isfinite(constant).all():
            return _absorbed(product, node, const, scale=constant)
    for name in ("add", "sub"):
        if found := _operands(node, name):
            product, constant, const = found
            last = "shift" if "scale" in product.attrs else "bias"
            if _is_open(product, users, last) and np.isfinite(constant).all():
                addend = constant if name == "add" else -constant
                return _absorbed(product, node, const, **{last: addend})
    if found := _operands(node, "max"):
        product, constant, const = found
        if _is_open(product, users) and not constant.any():
            return _absorbed(product, node, const, relu=True)
    return node


def _fuse_norm(node: Node, users: Users) -> Node:
    """Rewrite `(x − mean) · scale + bias` as `norm`; mean or bias may be missing."""
    found = _operands(node, "add")
    below = found[0] if found else node
    if not found and [u.op == "function" for u in users[node] if u] == [True]:
        (user,) = users[node]
        if user is not None and _operands(user, "add"):
            return node  # The rule matches at the addition of the bias.
    scaled = _operands(below, "mul")
    if not scaled or node.dtype != np.float32:
        return node
    if found and len(users[below]) != 1:
        return node
    alone = len(users[scaled[0]]) == 1
    shifted = _operands(scaled[0], "sub") if alone else None
    if not found and not shifted:
        return node
    x, mean, _ = shifted or (scaled[0], np.zeros(node.shape[-1:], np.float32), None)
    bias = found[1] if found else np.zeros(node.shape[-1:], np.float32)
    attrs = {"mean": mean, "scale": scaled[1], "bias": bias}
    if not all(np.isfinite(value).all() for value in attrs.values()):
        return node
    made = make("norm", [x], node.shape, node, **attrs)
    made.sources = frozenset().union(
        *(part[2].sources for part in (shifted, scaled, found) if part)
    )
    return made


class _FuseMean:
    """A rule that rewrites the mean over all positions as `mean`.

    The node adds in the order of a window of the image's size. `jnp.mean` adds in
    another order, which may flip a sign that follows, so one before a sign is kept.
    """

    def __init__(self, output: Node):
        self.before_signs: set[Node] = set()
        for node in live(output):
            if node.op == "bits" or "threshold" in node.attrs:
                self.before_signs.update(live(node))

    def __call__(self, node: Node, users: Users) -> Node:
        if node.op == "reshape" and len(node.shape) == 2:
            mean = node.nodes[0]
            found = _operands(mean, "div")
            if found and len(users[mean]) == 1 and self._whole(found[0], users):
                x = found[0].nodes[0]
                if (found[1] == prod(x.shape[1:-1])).all():
                    return make("mean", [x], node.shape, node)
            return node
        found = _operands(node, "div")
        if not found or found[0].op != "reduce" or len(users[found[0]]) != 1:
            return node
        total, count, _ = found
        x, rank = total.nodes[0], len(total.nodes[0].shape)
        everywhere = tuple(sorted(total.attrs["axes"])) == tuple(range(1, rank - 1))
        if total.attrs["kind"] != "sum" or not everywhere or rank < 3:
            return node
        if node in self.before_signs or not (count == prod(x.shape[1:-1])).all():
            return node
        return make("mean", [x], node.shape, node)

    def _whole(self, total: Node, users: Users) -> bool:
        a = total.attrs
        return (
            total.op == "window"
            and a["kind"] == "sum"
            and "threshold" not in a
            and len(users[total]) == 1
            and a["window"] == (1, *total.nodes[0].shape[1:-1], 1)
            and not any(map(any, a["padding"]))
        )


# Nodes of the packed network.


class _Emitter:
    """A builder of the nodes that tracks the shapes and dtypes of their results."""

    def __init__(self, parameters: dict[str, int]):
        self.left = dict(parameters)  # not yet counted in a node
        self.nodes: list[graph.Node] = []
        self.specs: list[Spec] = []
        self.values: dict[Node, int] = {}

    def run(self, x: Node, output: Node) -> tuple[graph.Node, ...]:
        self.values[x] = 0
        self.specs.append(Spec(x.shape[1:]))
        for node in live(output):
            if node is not x:
                self.values[node] = self._emit(node)
        if len(self.nodes) > checks.MOST_NODES:
            raise PackError(
                f"pack: expected at most {checks.MOST_NODES} operations, got "
                f"{len(self.nodes)}; loops are unrolled"
            )
        last = self.values[output]
        if last != len(self.nodes):
            raise refuse(output, "the function returns its input unchanged")
        if self.specs[last].dtype == "bool":
            raise refuse(output, "expected a function that returns floats, got bool")
        if not self.specs[last].shape:
            raise refuse(
                output,
                "expected a result [N, ..., classes], got [N]; keep the last axis",
            )
        if self.specs[last].bits:
            self._append(_with_number("mul", last, 1))
        return tuple(self.nodes)

    def _emit(self, node: Node) -> int:
        if node.shape[:1] != (-1,) or any(d < 0 for d in node.shape[1:]):
            raise refuse(node, "expected the batch as the first axis only")
        if node.dtype not in (np.float32, np.bool_):
            raise refuse(
                node,
                f"expected a network that computes in float32, got {node.dtype}",
            )
        return self._add(node, **getattr(self, f"_{node.op}")(node))

    def _add(
        self, node: Node, kind: type[graph.Node], inputs=None, arrays=None, **settings
    ) -> int:
        sources = set(node.sources) | set(node.attrs.get("sources", ()))
        sources |= {s for i in node.consts for s in i.sources}
        arrays = {k: _array(v) for k, v in (arrays or {}).items()}
        made = kind(
            inputs=tuple(self._inputs(node) if inputs is None else inputs),
            name=_name(node, sources),
            parameters=int(sum(self.left.pop(s, 0) for s in sorted(sources))),
            arrays=arrays,
            **settings,
        )
        try:
            made.checked(made.to_json())
            specs = [self.specs[i] for i in made.inputs]
            for key, member in made.members(specs).items():
                if member.kind == "floats" and not np.isfinite(arrays[key]).all():
                    raise ValueError(f"expected a finite {key}, got NaN or inf")
            value = self._append(made)
        except ValueError as error:
            raise refuse(node, str(error)) from error
        if (shape := self.specs[value].shape) != node.shape[1:]:
            raise AssertionError(f"{made.kind}: {shape} is not {node.shape[1:]}")
        return value

    def _append(self, made: graph.Node) -> int:
        """Add a node; return the index of its result."""
        self.specs.append(made.out([self.specs[i] for i in made.inputs]))
        self.nodes.append(made)
        return len(self.nodes)

    def _inputs(self, node: Node) -> list[int]:
        """Indices of the values that a node reads; adds nodes for its constants."""
        inputs = []
        for operand in node.ins:
            if isinstance(operand, Node):
                inputs.append(self.values[operand])
                continue
            shape = tuple(operand.shape[1:])
            inputs.append(
                self._constant(np.broadcast_to(operand.value, (1, *shape))[0])
            )
        return inputs

    def _constant(self, value: np.ndarray) -> int:
        arrays = {"value": _array(value)}
        return self._append(
            graph.Constant(inputs=(0,), shape=value.shape, arrays=arrays)
        )

    def _value(self, operand: Node | Const, rank: int) -> int:
        """Index of a value or of a constant bool, such as the mask of attention."""
        if isinstance(operand, Node):
            return self.values[operand]
        shape = operand.value.shape[1:] or (1,) * (rank - 1)
        value = self._constant(operand.value.reshape(shape).astype(np.float32))
        return self._append(_with_number("ne", value, 0))

    def _bits_of(self, node: Node) -> int:
        """Index of a value of signs as bits; adds a `Sign` node if they are floats."""
        value = self.values[node]
        if not self.specs[value].bits:
            zeros = np.zeros(node.shape[-1], np.float32)
            arrays = {"threshold": jnp.asarray(zeros), "flip": flip_words(zeros)}
            value = self._append(graph.Sign(inputs=(value,), arrays=arrays))
            self.values[node] = value
        return value

    def _binary(self, node: Node) -> dict[str, Any]:
        a, features = node.attrs, node.shape[-1]
        arrays: dict[str, Any] = {"kernel": ops.pack_kernel(a["kernel"], a["groups"])}
        if "threshold" not in a:
            arrays["scale"] = np.broadcast_to(a["alpha"], (features,))
        return {
            "kind": graph.BinaryConv,
            "inputs": [self._bits_of(node.nodes[0])],
            "window": tuple(a["kernel"].shape[:-2]),
            "features": features,
            **{k: a[k] for k in ("strides", "padding", "dilation", "groups")},
            **_epilogue(a, features, arrays),
        }

    def _conv(self, node: Node) -> dict[str, Any]:
        a = {"strides": (), "padding": (), "dilation": (), "groups": 1} | node.attrs
        features = node.shape[-1]
        arrays = {"kernel": np.asarray(a["kernel"], np.float32)}
        if "scale" in a:
            for name in ("scale", "shift"):
                value = np.asarray(a.get(name, 0), np.float32)
                arrays[name] = np.broadcast_to(value, (features,))
        return {
            "kind": graph.Conv,
            "window": tuple(a["kernel"].shape[:-2]),
            "features": features,
            "scaled": "scale" in a,
            **{k: a[k] for k in ("strides", "padding", "dilation", "groups")},
            **_epilogue(a, features, arrays),
        }

    _dense = _conv

    def _bits(self, node: Node) -> dict[str, Any]:
        arrays = _threshold_arrays(node.attrs["threshold"])
        return {"kind": graph.Sign, "arrays": arrays}

    def _bitpool(self, node: Node) -> dict[str, Any]:
        falls = np.broadcast_to(node.attrs["falls"], node.shape[-1:])
        return {
            "kind": graph.MaxPoolBits,
            "arrays": {"flip": flip_words(falls)},
            **{k: node.attrs[k] for k in _SPATIAL},
        }

    def _window(self, node: Node) -> dict[str, Any]:
        a, inputs = node.attrs, self._inputs(node)
        edges = [(a[k][0], a[k][-1]) for k in ("window", "strides", "padding")]
        if edges != [(1, 1), (1, 1), ((0, 0), (0, 0))]:
            raise refuse(node, "expected a window over the spatial axes only")
        sizes = {k: a[k][1:-1] for k in _SPATIAL}
        if "threshold" in a:
            arrays = _threshold_arrays(a["threshold"])
            made = {"kind": graph.SumPoolBits, "arrays": arrays}
        elif self.specs[inputs[0]].bits and a["kind"] == "max":
            flip = flip_words(np.zeros(node.shape[-1], bool))
            made = {"kind": graph.MaxPoolBits, "arrays": {"flip": flip}}
        else:
            made = {"kind": graph.Pool, "function": a["kind"]}
        return {"inputs": inputs, **made, **sizes}

    def _norm(self, node: Node) -> dict[str, Any]:
        arrays = {k: node.attrs[k] for k in ("mean", "scale", "bias")}
        return {"kind": graph.Norm, "arrays": arrays}

    def _mean(self, node: Node) -> dict[str, Any]:
        return {"kind": graph.Mean}

    def _matmul(self, node: Node) -> dict[str, Any]:
        return {"kind": graph.MatMul}

    def _function(self, node: Node) -> dict[str, Any]:
        inputs: list[int] = []
        operands, shapes, arrays = [], [], {}
        found = [i.shape for i in node.nodes]
        # Axes along which constants alone have the size of the result.
        wide = [all(s[axis] == 1 for s in found) for axis in range(len(node.shape))]
        for at, operand in enumerate(node.ins):
            if isinstance(operand, Node) or operand.dtype == np.bool_:
                index = self._value(operand, len(node.shape))
                if index not in inputs:
                    inputs.append(index)
                operands.append(inputs.index(index))
                shapes.append(())
                continue
            value = operand.value
            if value.ndim == len(node.shape):
                if value.shape[0] != 1:
                    raise refuse(node, "has one constant per image of the batch")
                value = value[0]
            if any(wide) and operand.shape:
                sizes = zip(wide, operand.shape, strict=True)
                full = [d if alone else 1 for alone, d in sizes]
                value = np.broadcast_to(
                    value, np.broadcast_shapes(value.shape, full[1:])
                )
            if value.dtype != np.float32:
                raise refuse(
                    node,
                    f"expected a network that computes in float32, got {value.dtype}",
                )
            operands.append(-1)
            shapes.append(tuple(value.shape))
            arrays[f"constant{at}"] = value
        return {
            "kind": graph.Elementwise,
            "inputs": inputs,
            "function": node.attrs["name"],
            "exponent": node.attrs.get("exponent", 0),
            "operands": tuple(operands),
            "shapes": tuple(shapes),
            "arrays": arrays,
        }

    def _reduce(self, node: Node) -> dict[str, Any]:
        a = node.attrs
        return {"kind": graph.Reduce, "function": a["kind"], "axes": a["axes"]}

    def _reshape(self, node: Node) -> dict[str, Any]:
        return {"kind": graph.Reshape, "shape": node.shape[1:]}

    def _transpose(self, node: Node) -> dict[str, Any]:
        order = node.attrs["order"]
        if order[0] != 0:
            raise refuse(node, "expected the batch as the first axis only")
        return {"kind": graph.Transpose, "order": order[1:]}

    def _broadcast(self, node: Node) -> dict[str, Any]:
        return {"kind": graph.Broadcast, "shape": node.shape[1:]}

    def _slice(self, node: Node) -> dict[str, Any]:
        a = node.attrs
        if a["start"][0] != 0 or a["stop"][0] != -1 or a["strides"][0] != 1:
            raise refuse(node, "slices the batch axis")
        return {
            "kind": graph.Slice,
            **{k: a[k][1:] for k in ("start", "stop", "strides")},
        }

    def _pad(self, node: Node) -> dict[str, Any]:
        a = node.attrs
        if not (abs(a["value"]) < 1e30 or a["value"] == -np.inf):
            raise refuse(
                node,
                "expected a value below 1e30 in magnitude or -jnp.inf, got "
                f"{a['value']:g}",
            )
        return {"kind": graph.Pad, "padding": a["padding"][1:], "value": a["value"]}

    def _concat(self, node: Node) -> dict[str, Any]:
        if node.attrs["axis"] == 0:
            raise refuse(node, "concatenates along the batch axis")
        inputs, axis = self._inputs(node), node.attrs["axis"]
        while len(inputs) > checks.MOST_INPUTS:
            first, rest = inputs[: checks.MOST_INPUTS], inputs[checks.MOST_INPUTS :]
            part = graph.Concatenate(inputs=tuple(first), axis=axis)
            inputs = [self._append(part), *rest]
        return {"kind": graph.Concatenate, "inputs": inputs, "axis": axis}

    def _take(self, node: Node) -> dict[str, Any]:
        places = np.asarray(node.attrs["indices"], np.int32)
        return {"kind": graph.Take, "shape": places.shape, "arrays": {"places": places}}


def _array(value: Any) -> Any:
    return value if isinstance(value, ops.PackedKernel) else jnp.asarray(value)


def _with_number(function: str, value: int, number: float) -> graph.Elementwise:
    """A function of a value and a number."""
    return graph.Elementwise(
        inputs=(value,),
        function=function,
        operands=(0, -1),
        shapes=((), ()),
        arrays={"constant1": jnp.float32(number)},
    )


def _threshold_arrays(threshold: ops.Threshold) -> dict[str, Any]:
    return {"threshold": threshold.threshold, "flip": threshold.flip}


def _epilogue(attrs: dict[str, Any], features: int, arrays: dict[str, Any]):
    """The settings and arrays of a product's epilogue."""
    if "threshold" in attrs:
        arrays |= _threshold_arrays(attrs["threshold"])
        return {"epilogue": THRESHOLD, "arrays": arrays}
    bias = attrs.get("bias", np.zeros(features, np.float32))
    arrays["bias"] = np.broadcast_to(bias, (features,))
    return {"epilogue": RELU if attrs.get("relu") else AFFINE, "arrays": arrays}


def _name(node: Node, sources: Iterable[str]) -> str:
    """The layer's path, from that of its kernel or a parameter; else the scope."""
    own = sorted(node.attrs.get("sources", ())) or sorted(sources)
    named = [s for s in own if not s.startswith("closure/")]
    name = named[0].rpartition("/")[0] if named else node.where
    return "".join(c if c.isprintable() else "?" for c in name)[-200:]
