"""Detection of signs and products of signs by value.

A sign is any function of one comparison whose two values are −1 and +1, such as
`2 * (x > 0) - 1` or `where(x == 0, 1, jnp.sign(x))`. A product of signs has an input
that is known to be ±1 (padding adds 0) and a constant kernel with one magnitude per
output channel.

Operations in addition to those of `normal`:

* `sign` {kind, constant, flip}: +1 where `(x kind constant) xor flip`, else −1; `kind`
  is `ge` or `gt`;
* `binary` {kernel, alpha, strides, padding, dilation, groups, sources}: a convolution
  or dense layer of signs, times α.
"""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.packing.functions import COMPARISONS, apply_function
from xnor_jax.packing.normal import (
    Users,
    evaluate,
    is_function_of_two,
    make,
    refuse,
    reshaped,
    rewrite,
)
from xnor_jax.packing.trace import Const, Node, PackError, compact, live

# Operations whose result has only entries of their operands.
_SIGN_PRESERVING = ("reshape", "transpose", "slice", "broadcast", "take", "concat")


def find_signs(x: Node, output: Node) -> Node:
    """Rewrite the signs of a graph as `sign`."""
    return rewrite(_Signs(), x, output)


def find_products(x: Node, output: Node) -> Node:
    """Rewrite the products of signs of a graph as `binary`."""
    return rewrite(_product, x, output)


def check_coverage(output: Node, masked: frozenset[str]) -> None:
    """Refuse a binary kernel that is in no product of signs.

    Args:
      output: The output of a graph after `find_products`.
      masked: Paths of the kernels that the mask selects as binary.

    Raises:
      PackError: If the input of a binary kernel is not known to be ±1 (the message
        names the operation that it comes from); if a masked kernel is in no product of
        signs; or if there is no product of signs.
    """
    nodes = live(output)
    for node in nodes:
        if _is_written_out(node):
            raise refuse(
                node,
                "the sum of signs times ±α, which is a product of signs; write it as "
                "one, with @ or jnp.einsum",
            )
        if node.op in ("conv", "dense") and _is_binary(node.attrs["kernel"]):
            reason = _why_not_signs(node.nodes[0])
            names = ", ".join(sorted(node.attrs["sources"])) or "its kernel"
            raise refuse(
                node, f"{names} is ±α, but its input is not known to be ±1: {reason}"
            )
    products = [node for node in nodes if node.op == "binary"]
    found = frozenset().union(*(node.attrs["sources"] for node in products))
    if missing := sorted(masked - found):
        raise PackError(
            f"pack: the mask selects {', '.join(missing)}, not used in any product of "
            "signs"
        )
    if not products:
        raise PackError(
            "pack: expected a model with a binary layer, got none; use those of "
            "xnor_jax.nn, or pass a mask that selects the binary kernels"
        )


class _Compared(NamedTuple):
    """A value that takes one number each below, at and above a constant.

    Attributes:
      x: The value that is compared.
      constant: What it is compared with.
      values: The numbers for `x < constant`, `x == constant` and `x > constant`.
    """

    x: Node
    constant: Const
    values: tuple[Any, Any, Any]

    def same(self, other: "_Compared") -> bool:
        """Whether both compare the same value with the same constant."""
        return other.x is self.x and _equal(self.constant, other.constant)


class _Signs:
    """A rule that evaluates the functions of one comparison for each of its outcomes.

    A bool that is no comparison with a constant is itself compared, as 0 or 1.
    """

    def __init__(self):
        self.known: dict[Node, _Compared] = {}

    def __call__(self, node: Node, users: Users) -> Node:
        if node.op != "function":
            return node
        if found := _straight_through(node):
            return found
        compared = self._of_known(node) or _compared(node)
        if compared is None and node.dtype == np.bool_:
            compared = _Compared(_to_float(node), _HALF, (False, True, True))
        if compared is None:
            return node
        self.known[node] = compared
        sign = _as_sign(node, compared)
        self.known[sign] = compared
        return sign

    def _of_known(self, node: Node) -> _Compared | None:
        known = [self.known[i] for i in node.nodes if i in self.known]
        if not known or len(known) < len(node.nodes):
            return None
        first, values = known[0], []
        if not all(first.same(k) for k in known):
            return None
        for at in range(3):
            args = iter(known)
            with jax.ensure_compile_time_eval():
                operands = [
                    jnp.asarray(
                        next(args).values[at] if isinstance(i, Node) else i.value
                    )
                    for i in node.ins
                ]
                value = compact(evaluate(node, operands))
            if value.size != 1 or node.shape != first.x.shape:
                return None
            values.append(value.reshape(()))
        return first._replace(values=tuple(values))


def _compared(node: Node) -> _Compared | None:
    """A comparison with a constant, or `jnp.sign`; else None."""
    name, operands = node.attrs["name"], node.ins
    if name == "sign":
        constant = Const(np.zeros((), node.dtype), ())
        return _Compared(node.nodes[0], constant, (-1.0, 0.0, 1.0))
    if name not in (*COMPARISONS, "eq", "ne") or len(node.nodes) != 1:
        return None
    (x,), (constant,) = node.nodes, node.consts
    if x.shape != node.shape or x.dtype == np.bool_:
        return None
    values = (np.float32(at) for at in (-1, 0, 1))
    args = ([v if i is x else np.float32(0) for i in operands] for v in values)
    with jax.ensure_compile_time_eval():
        below, at, above = (np.asarray(apply_function(name, a)) for a in args)
    return _Compared(x, constant, (below, at, above))


_HALF = Const(np.array(0.5, np.float32), ())


def _to_float(node: Node) -> Node:
    """A bool as 0 or 1."""
    number = make("function", [node], node.shape, node, name="to_float")
    number.dtype = np.dtype(np.float32)
    return number


def _as_sign(node: Node, compared: _Compared) -> Node:
    """The node as a `sign` if its values are −1 and +1; else unchanged."""
    if node.dtype == np.bool_ or not jnp.issubdtype(node.dtype, jnp.number):
        return node
    below, at, above = (float(v) for v in compared.values)
    if not {below, at, above} <= {-1.0, 1.0}:
        return node
    x, constant, kind, flip = compared.x, compared.constant, "ge", below > above
    if below == at == above:
        constant, flip = Const(np.array(-np.inf, np.float32), ()), at < 0
    elif below == above:
        equal = make("function", [x, constant], node.shape, node, name="eq")
        equal.dtype = np.dtype(np.bool_)
        x, constant, flip = _to_float(equal), _HALF, at < 0
    elif at == below:
        kind = "gt"
    attrs = {"kind": kind, "constant": constant, "flip": flip}
    sign = make("sign", [x], node.shape, node, **attrs)
    if node.dtype == np.float32:
        return sign
    sign.dtype = np.dtype(np.float32)
    return make("function", [sign], node.shape, node, name="convert", dtype=node.dtype)


def _straight_through(node: Node) -> Node | None:
    """The signs `s` of a straight-through `x + (s − x)` or `x − (x − s)`; else None."""
    if len(node.nodes) != 2:
        return None
    a, b = node.nodes
    if node.attrs["name"] == "add":
        for x, rest in ((a, b), (b, a)):
            if is_function_of_two(rest, "sub") and _equal(rest.nodes[1], x):
                if is_signs(rest.nodes[0]):
                    return rest.nodes[0]
    if node.attrs["name"] == "sub" and is_function_of_two(b, "sub"):
        if _equal(b.nodes[0], a) and is_signs(b.nodes[1]):
            return b.nodes[1]
    return None


def _equal(a: Node | Const, b: Node | Const) -> bool:
    """Whether two values are the same elementwise functions of the same values."""
    if isinstance(a, Const) and isinstance(b, Const):
        return np.array_equal(a.value, b.value)
    if isinstance(a, Const) or isinstance(b, Const):
        return False
    functions = a.op == b.op == "function" and len(a.ins) == len(b.ins)
    return a is b or (
        functions
        and a.attrs == b.attrs
        and all(_equal(p, q) for p, q in zip(a.ins, b.ins, strict=True))
    )


def is_signs(node: Node) -> bool:
    """Whether every entry of a value is known to be −1 or +1."""
    return _not_signs(node) is None


def _not_signs(node: Node) -> Node | None:
    """The operation from which entries other than ±1 may come; else None."""
    op, a = node.op, node.attrs
    if op == "sign":
        return None
    follow = op in _SIGN_PRESERVING
    if op in ("window", "reduce"):
        follow = a["kind"] != "sum"
    if op == "pad":
        follow = abs(a["value"]) == 1
    if op == "function":
        follow = a["name"] in ("max", "min", "mul", "neg", "select") or (
            a["name"] == "convert"
            and jnp.issubdtype(node.dtype, jnp.number)
            and not jnp.issubdtype(node.dtype, jnp.unsignedinteger)
        )
    if not follow:
        return node
    for operand in node.ins[1:] if a.get("name") == "select" else node.ins:
        if isinstance(operand, Const):
            if not (np.abs(operand.value) == 1).all():
                return node
        elif (found := _not_signs(operand)) is not None:
            return found
    return None


def _is_written_out(node: Node) -> bool:
    """Whether a node is `(signs * kernel).sum(axis)` with a kernel ±α."""
    if node.op != "reduce" or node.attrs["kind"] != "sum":
        return False
    x, axes = node.nodes[0], node.attrs["axes"]
    if x.attrs.get("name") != "mul" or len(x.consts) != 1 or not is_signs(x.nodes[0]):
        return False
    kernel = x.consts[0].value
    if not kernel.ndim or any(kernel.shape[axis] == 1 for axis in axes):
        return False
    kept = [d for d in range(kernel.ndim) if d not in axes]
    size = prod(kernel.shape[d] for d in kept)
    return _is_binary(kernel.transpose(*axes, *kept).reshape(-1, size))


def _why_not_signs(node: Node) -> str:
    found = _not_signs(node) or node
    if found.op == "input":
        return "it is the network's own input"
    name = found.attrs.get("name", found.op)
    if name == "sign":
        return f"jnp.sign {found.place} gives 0 at 0; use xnor_jax.sign_ste"
    if name == "mul" and any(map(is_signs, found.nodes)):
        return f"mul {found.place} scales the signs; scale the product instead"
    return f"it comes from {name} {found.place}".rstrip()


def _magnitudes(kernel: np.ndarray) -> np.ndarray | None:
    """The α of a kernel `[..., C_out]` that is ±α; else None."""
    flat = np.abs(np.asarray(kernel, np.float32)).reshape(-1, kernel.shape[-1])
    return flat[0] if (flat == flat[:1]).all() else None


def _is_binary(kernel: np.ndarray) -> bool:
    """Whether a kernel is ±α, with both signs and several weights per filter."""
    kernel = np.asarray(kernel, np.float32)
    mixed = (kernel > 0).any() and (kernel < 0).any()  # excludes box filters
    many = kernel.size > kernel.shape[-1]
    return bool(mixed and many and _magnitudes(kernel) is not None)


def _product(node: Node, users: Users) -> Node:
    if node.attrs.get("name") == "convert" and node.dtype == np.float32:
        x = node.nodes[0]
        if x.attrs.get("integer_sums"):
            return x.nodes[0]
    if node.op not in ("conv", "dense") or not is_signs(node.nodes[0]):
        return node
    kernel = np.asarray(node.attrs["kernel"], np.float32)
    alpha = _magnitudes(kernel)
    if alpha is None:
        return node
    if not jnp.issubdtype(node.dtype, jnp.floating):
        return _integer_product(node, alpha.max() * kernel[..., 0].size, users)
    x, shape = node.nodes[0], node.shape
    while x.op == "function" and x.attrs["name"] == "convert":
        x = x.nodes[0]
    signs = np.where(kernel >= 0, np.float32(1), np.float32(-1))
    unit: dict[str, Any] = {"strides": (), "padding": (), "dilation": (), "groups": 1}
    attrs = unit | node.attrs | {"kernel": signs, "alpha": alpha}
    image = x.nodes[0] if x.op == "reshape" else x
    flat = len(x.shape) == 2 and 3 <= len(image.shape) <= 5
    if node.op == "dense" and flat and image.shape[0] == x.shape[0]:
        # A dense layer on an image is a convolution with a window of the image's size.
        rank = len(image.shape) - 2
        attrs |= {
            "kernel": signs.reshape(*image.shape[1:], -1),
            "strides": (1,) * rank,
            "padding": ((0, 0),) * rank,
            "dilation": (1,) * rank,
        }
        wide = (shape[0], *(1,) * rank, shape[-1])
        return reshaped(make("binary", [image], wide, node, **attrs), shape)
    return make("binary", [x], shape, node, **attrs)


def _integer_product(node: Node, largest: float, users: Users) -> Node:
    """A product in an integer dtype: a product of signs, converted."""
    if largest > min(np.iinfo(node.dtype).max, 2**24):
        raise refuse(
            node, f"sums of up to {largest:.0f} overflow {node.dtype}; use float32"
        )
    dtype, shape = node.dtype, node.shape
    node.dtype = np.dtype(np.float32)
    sums = _product(node, users)
    attrs = {"name": "convert", "dtype": dtype, "integer_sums": True}
    made = make("function", [sums], shape, sums, **attrs)
    made.dtype = dtype
    return made
