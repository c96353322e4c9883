"""Detection of signs and products of signs by value.

A sign is any function of one comparison whose two values are −1 and +1. A product of
signs has an input that is known to be ±1 (padding adds 0) and a constant kernel with
one magnitude per output channel.

Operations in addition to those of `normal`:

* `sign` {kind, constant, flip}: +1 where `(x kind constant) xor flip`, else −1; `kind`
  is `ge` or `gt`;
* `binary` {kernel, alpha, strides, padding, dilation, groups, sources}: a convolution
  or dense layer of signs, times α.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.packing.functions import COMPARISONS
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
_SWAPPED = {"ge": "le", "le": "ge", "gt": "lt", "lt": "gt"}
_NEGATED = {"lt": "ge", "le": "gt"}


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
            "pack: expected a model with a binary layer, got none; pass a mask that "
            "selects the binary kernels"
        )


class _Signs:
    """A rule that evaluates each function of one comparison for both outcomes."""

    def __init__(self):
        # Node to (comparison, value if it is false, value if it is true).
        self.values: dict[Node, tuple[Node, Any, Any]] = {}

    def __call__(self, node: Node, users: Users) -> Node:
        if node.op != "function":
            return node
        name, nodes = node.attrs["name"], node.nodes
        if name in COMPARISONS and len(nodes) == 1 and nodes[0] not in self.values:
            self.values[node] = (node, np.bool_(False), np.bool_(True))
            return node
        if found := _straight_through(node):
            return found
        known = [self.values.get(i) for i in nodes]
        compared = known[0][0] if known and known[0] else None
        if compared is None or any(k is None or k[0] is not compared for k in known):
            return node
        low, high = (self._value(node, known, at) for at in (1, 2))
        if node.shape != compared.shape or low.size != 1 or high.size != 1:
            return node
        low, high = low.reshape(()), high.reshape(())
        self.values[node] = (compared, low, high)
        if not jnp.issubdtype(node.dtype, jnp.floating):
            return node
        if {float(low), float(high)} != {-1.0, 1.0}:
            return node
        made = self._sign(node, compared, flip=bool(low > high))
        self.values[made] = self.values[node]
        return made

    def _value(self, node: Node, known: list[Any], at: int) -> np.ndarray:
        args = iter(known)
        with jax.ensure_compile_time_eval():
            values = [
                jnp.asarray(next(args)[at] if isinstance(i, Node) else i.value)
                for i in node.ins
            ]
            return compact(evaluate(node, values))

    def _sign(self, node: Node, compared: Node, *, flip: bool) -> Node:
        x, constant = compared.ins
        kind = compared.attrs["name"]
        if isinstance(x, Const):
            x, constant, kind = constant, x, _SWAPPED[kind]
        if kind in _NEGATED:
            kind, flip = _NEGATED[kind], not flip
        attrs = {"kind": kind, "constant": constant, "flip": flip}
        return make("sign", [x], node.shape, node, **attrs)


def _straight_through(node: Node) -> Node | None:
    """The signs `s` of a straight-through `x + (s − x)` or `x − (x − s)`; else None."""
    if len(node.nodes) != 2:
        return None
    a, b = node.nodes
    if node.attrs["name"] == "add":
        for x, rest in ((a, b), (b, a)):
            if is_function_of_two(rest, "sub") and rest.nodes[1] is x:
                if is_signs(rest.nodes[0]):
                    return rest.nodes[0]
    if node.attrs["name"] == "sub" and is_function_of_two(b, "sub"):
        if b.nodes[0] is a and is_signs(b.nodes[1]):
            return b.nodes[1]
    return None


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
        follow = a["name"] in ("max", "min", "mul", "neg") or (
            a["name"] == "convert" and jnp.issubdtype(node.dtype, jnp.floating)
        )
    if not follow:
        return node
    for operand in node.ins:
        if isinstance(operand, Const):
            if not (np.abs(operand.value) == 1).all():
                return node
        elif (found := _not_signs(operand)) is not None:
            return found
    return None


def _why_not_signs(node: Node) -> str:
    found = _not_signs(node) or node
    if found.op == "input":
        return "it is the network's own input"
    name = found.attrs.get("name", found.op)
    if name == "sign":
        return f"jnp.sign {found.place} gives 0 at 0; use xnor_jax.sign_ste"
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
    if node.op not in ("conv", "dense") or not is_signs(node.nodes[0]):
        return node
    kernel = np.asarray(node.attrs["kernel"], np.float32)
    alpha = _magnitudes(kernel)
    if alpha is None:
        return node
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
