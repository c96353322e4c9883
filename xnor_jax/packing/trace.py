"""A JAX function as a flat graph: calls inlined, constants evaluated, any batch size.

The function is traced twice, with batch sizes 2 and 3. A number that differs between
the traces is a multiple of the batch size `N` and is stored as a negative number: −k
stands for `k·N`. Symbolic shapes need one trace only, but break code such as `len(x)`.

Only this module, `normal` and `exact` depend on the names of JAX's primitives.
"""

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.extend import source_info_util

from xnor_jax._words import first_line
from xnor_jax.masks import path_string

# Of the two traces.
BATCH_SIZES = (2, 3)
# Primitive to the parameter that holds its jaxpr.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
    "custom_vmap_call": "call",
}
_RANDOM = ("random_", "threefry", "rng_")
_MOVES = ("broadcast_in_dim", "transpose", "reshape", "squeeze", "slice", "pad")
# Operations that NumPy rounds as XLA does.
_ELEMENTWISE = {
    "abs": np.abs,
    "add": np.add,
    "copy": np.copy,
    "div": np.divide,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "select_n": lambda at, no, yes: np.where(at, yes, no),
    "sub": np.subtract,
}
_WIDENED = (np.dtype(bool), np.dtype(np.int32), np.dtype(np.float32))
_OPAQUE = ("ffi_call", "pure_callback", "io_callback", "pallas_call", "shard_map")
# Evaluated on the indices of the entries, to find which entries they pick.
_RUN_ON_INDICES = ("gather", "rev", "dynamic_slice")
_UNCOMPARED = ("sharding", "out_sharding", "primitive", "original")
LOOPS = ("scan", "while")
_LONGEST_LOOP = 1024
_RANDOM_SOURCE = "drawn at random"
_DYNAMIC = (
    "the control flow depends on the input's values, which cannot be traced; use "
    "jnp.where"
)
# Packages whose stack frames are not part of the user's program.
_LIBRARIES = (
    *(str(Path(str(module.__file__)).parent) for module in (jax, flax, np)),
    str(Path(__file__).parents[1]),
)
# Raised when Python or NumPy needs the value of a tracer.
_CONCRETIZATION_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class PackError(ValueError):
    """Raised when a function or model cannot be packed."""


class _LoopError(Exception):
    """Raised for a loop that cannot be unrolled."""


@dataclass(eq=False)
class Const:
    """A value that does not depend on the input.

    Attributes:
      value: The entries, with size 1 along each axis on which they are constant.
      shape: The full shape; −k stands for `k·N`.
      sources: Paths of the parameters that it was computed from.
    """

    value: np.ndarray
    shape: tuple[int, ...]
    sources: frozenset[str] = frozenset()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of `value`."""
        return self.value.dtype

    def full(self) -> np.ndarray:
        """The value in its full shape."""
        return np.broadcast_to(self.value, self.shape)

    def array(self) -> Any:
        """The full value, or the PRNG key, as an operand of a primitive."""
        return self.value[()] if self.dtype == object else np.array(self.full())


@dataclass(eq=False)
class Node:
    """A value that depends on the input, and how it is computed.

    Attributes:
      op: Name of a primitive, or of an operation after `normal.translate`.
      ins: The operands.
      attrs: The parameters of the operation.
      shape: The shape; −k stands for `k·N`.
      dtype: The dtype.
      where: Scope in the user's program, such as a Linen layer's name.
      line: Line of the user's program.
      sources: Paths of the parameters that were folded into it.
      primitive: Name of the primitive that it was made from, for error messages.
    """

    op: str
    ins: list["Node | Const"]
    attrs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: Any
    where: str = ""
    line: str = ""
    sources: frozenset[str] = field(default=frozenset())
    primitive: str = ""

    @property
    def nodes(self) -> list["Node"]:
        """The operands that depend on the input."""
        return [i for i in self.ins if isinstance(i, Node)]

    @property
    def consts(self) -> list[Const]:
        """The operands that do not depend on the input."""
        return [i for i in self.ins if isinstance(i, Const)]

    @property
    def place(self) -> str:
        """Scope, layer (its own or the one before) and line, for error messages."""
        node, layer, after = self, self._layer, ""
        while not layer and node.nodes:
            node, after = node.nodes[0], "after "
            layer = node._layer
        scope = self.where and f"at {self.where}"
        parts = (scope, layer and f"{after or 'of '}{layer}", self.line)
        return " ".join(filter(None, parts))

    @property
    def _layer(self) -> str:
        """Path of the layer whose parameters the node reads; empty if there is none."""
        found = {s for i in self.consts for s in i.sources}
        found |= {*self.sources, *self.attrs.get("sources", ())}
        named = sorted(s for s in found if "/" in s and not s.startswith("closure/"))
        return named[0].rpartition("/")[0] if named else ""


@dataclass(frozen=True)
class Trace:
    """A function's graph.

    Attributes:
      input: The array argument.
      output: The result.
      parameters: Size of each parameter, by its path.
    """

    input: Node
    output: Node
    parameters: dict[str, int]


def trace(
    function: Callable[[Any, jax.Array], Any],
    params: Any,
    image_shape: Sequence[int],
) -> Trace:
    """Trace `function(params, x)` for float32 `x` of shape `[N, *image_shape]`.

    Args:
      function: The function. Arrays that it closes over count as parameters.
      params: A pytree of arrays.
      image_shape: The input's shape without the batch.

    Raises:
      PackError: If the program depends on the batch size, on random numbers or on the
        input's values; if it has a loop that cannot be unrolled or an opaque call, such
        as a callback; if a parameter is not finite; or if the result is not one array
        that depends on the input.
    """
    size, another = BATCH_SIZES
    first = _flatten(function, params, (size, *image_shape))
    try:
        second = _flatten(function, params, (another, *image_shape))
    except PackError:
        raise
    except Exception as error:  # the function may raise anything
        raise PackError(
            f"pack: expected a function of any batch; this one takes {size} images but "
            f"fails for {another}: {first_line(error)}"
        ) from error
    nodes, others = (live(f.output) for f in (first, second))
    for node, other in zip_longest(nodes, others):
        if node is None or other is None or node.op != other.op:
            raise _batch_dependence(node or first.output)
    for check in (_check_reduction, _unify_nodes):
        for node, other in zip(nodes, others, strict=True):
            check(node, other)
    return first


def live(output: Node, known: Iterable[Node] = ()) -> list[Node]:
    """The nodes that a value depends on, operands first, then the value itself.

    Nodes in `known`, and those that only they depend on, are left out.
    """
    seen = set(known)
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(output, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((i, False) for i in reversed(node.nodes))
    return order


def compact(value: Any) -> np.ndarray:
    """The value with size 1 along each axis on which it is constant."""
    value = np.asarray(value)
    for axis in range(value.ndim):
        if value.shape[axis] > 1:
            first = value.take([0], axis)
            # Most values differ in the second entry already.
            if _same(value.take([1], axis), first) and _same(value, first):
                value = first
    return value


def _flatten(function: Callable, params: Any, shape: tuple[int, ...]) -> Trace:
    try:
        closed, result = jax.make_jaxpr(function, return_shape=True)(
            params, jax.ShapeDtypeStruct(shape, jnp.float32)
        )
    except _CONCRETIZATION_ERRORS as error:
        raise PackError(
            f"pack: {_last_line(error)}: the program depends on the input's values "
            f"({type(error).__name__}), which cannot be traced; use jnp.where"
        ) from error
    except Exception as error:
        if "TraceContext" in type(error).__name__ or "different trace" in str(error):
            raise PackError(
                "pack: the function mutates state that it closes over, as BatchNorm "
                "and Dropout in training mode do; call model.eval() first, or pack the "
                "nnx.Module itself"
            ) from error
        raise
    if not isinstance(result, jax.ShapeDtypeStruct):
        count = len(closed.jaxpr.outvars)
        found = f"a {type(result).__name__}" if count == 1 else count
        raise PackError(
            f"pack: expected a function that returns one array, got {found}; pack a "
            "function that returns one of them"
        )
    arguments = [
        constant(leaf, frozenset({path_string(path)}))
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    constants = [
        constant(value, frozenset({f"closure/{at}"}))
        for at, value in enumerate(closed.consts)
    ]
    # The program's own numbers are no parameters, and may be infinite.
    arrays = [c for c in constants if c.shape and jnp.issubdtype(c.dtype, jnp.floating)]
    parameters = {}
    for const in (*arguments, *arrays):
        (name,) = const.sources
        parameters[name] = prod(const.shape)
        floating = jnp.issubdtype(const.dtype, jnp.floating)
        if floating and not np.isfinite(const.value.astype(np.float32)).all():
            raise PackError(f"pack: expected finite numbers, got NaN or inf at {name}")
    x = Node("input", [], {}, shape, np.dtype(np.float32))
    program = jex.ClosedJaxpr(closed.jaxpr, constants)
    (output,) = _Tracer().run(program, [*arguments, x])
    if isinstance(output, Const):
        raise PackError("pack: the function's result does not depend on its input")
    return Trace(x, output, parameters)


def _last_line(error: Exception) -> str:
    """The line of the user's program that raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_LIBRARIES)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno} ({last.name})"


class Interpreter:
    """Evaluates a jaxpr, some of whose operands are constants.

    Calls are inlined, equations of constants evaluated and, by `unroll`, loops
    unrolled. A subclass says what to do with values that depend on the input. `scope`
    and `line` are those of the call, for error messages.
    """

    def apply(self, equation: Any, ins: list[Any], scope: str, line: str) -> list[Any]:
        """The results of an equation; not all of its operands are constants."""
        raise NotImplementedError

    def row(self, value: Any, at: int, scope: str, line: str) -> Any:
        """Entry `at` of a value along its first axis."""
        raise NotImplementedError

    def stack(self, values: list[Any], aval: Any, scope: str, line: str) -> Any:
        """Values, not all constants, along a new first axis."""
        raise NotImplementedError

    def evaluate(self, equation: Any, ins: list[Const], scope: str) -> list[Const]:
        """The results of an equation of constants."""
        sources = frozenset().union(*(i.sources for i in ins))
        if (value := _by_numpy(equation, ins)) is not None:
            return [constant(value, sources)]
        if equation.primitive.name.startswith(_RANDOM):
            sources |= {_RANDOM_SOURCE}
        with jax.ensure_compile_time_eval():
            got = equation.primitive.bind(*(i.array() for i in ins), **equation.params)
        got = got if equation.primitive.multiple_results else [got]
        return [constant(value, sources) for value in got]

    def run(
        self, program: Any, args: Sequence[Any], scope: str = "", line: str = ""
    ) -> list[Any]:
        """Evaluate a jaxpr, open or closed."""
        jaxpr = getattr(program, "jaxpr", program)
        values = [*map(constant, getattr(program, "consts", ())), *args]
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), values, strict=True))

        results = [v for v in jaxpr.outvars if not isinstance(v, jex.Literal)]

        def read(var: Any) -> Any:
            if isinstance(var, jex.Literal):
                aval: Any = var.aval
                return constant(np.asarray(var.val, aval.dtype))
            return env[var]

        variables = [
            [v for v in equation.invars if not isinstance(v, jex.Literal)]
            for equation in jaxpr.eqns
        ]
        last = {v: at for at, read_here in enumerate(variables) for v in read_here}
        for at, equation in enumerate(jaxpr.eqns):
            ins = [read(v) for v in equation.invars]
            outs = self._equation(equation, ins, scope, line)
            env |= dict(zip(equation.outvars, outs, strict=True))
            for v in set(variables[at]) - set(results):
                if last[v] == at:
                    del env[v]  # frees the memory of large intermediate values
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, equation, ins: list[Any], scope: str, line: str) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        stack = str(equation.source_info.name_stack)
        scope = "/".join(filter(None, (scope, stack)))
        # Equations inside JAX's own functions have no user line: take that of the call.
        found = source_info_util.summarize(equation.source_info)
        line = line if not found or found == "unknown" else found
        if name in _CALLS:
            return self.run(params[_CALLS[name]], ins, scope, line)
        if name == "cond" and isinstance(ins[0], Const):
            branches = params["branches"]
            at = int(np.clip(int(ins[0].value), 0, len(branches) - 1))
            return self.run(branches[at], ins[1:], scope, line)
        if all(isinstance(i, Const) for i in ins):
            return self.evaluate(equation, ins, scope)
        return self.apply(equation, ins, scope, line)

    def unroll(self, equation: Any, ins: list[Any], scope: str, line: str) -> list[Any]:
        """The results of one of `LOOPS`."""
        return getattr(self, f"_{equation.primitive.name}")(equation, ins, scope, line)

    def _scan(self, equation, ins, scope, line):
        """Unroll a `scan`, as a `fori_loop` of known length or `nnx.scan` makes it."""
        params, length = equation.params, equation.params["length"]
        body = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        # The parameters that count the operands differ between JAX versions. An operand
        # with one axis more than in the body is scanned over; such a result is stacked.
        rowed, stacked = (
            sum(a.aval.ndim != b.aval.ndim for a, b in zip(*pair, strict=True))
            for pair in (
                (equation.invars, body.invars),
                (equation.outvars, body.outvars),
            )
        )
        kept = len(body.outvars) - stacked
        first = len(ins) - rowed
        fixed, carry = ins[: first - kept], ins[first - kept : first]
        if length > _LONGEST_LOOP:
            most = f"expected at most {_LONGEST_LOOP} iterations, got {length}"
            raise _LoopError(most)
        each: list[Any] = [None] * length
        for at in reversed(range(length)) if params["reverse"] else range(length):
            now = [
                constant(i.full()[at], i.sources)
                if isinstance(i, Const)
                else self.row(i, at, scope, line)
                for i in ins[first:]
            ]
            args = [*fixed, *carry, *now]
            outs = self.run(params["jaxpr"], args, f"{scope}/{at}", line)
            carry, each[at] = outs[:kept], outs[kept:]
        for n, var in enumerate(equation.outvars[kept:]):
            values = [y[n] for y in each]
            known = all(isinstance(v, Const) for v in values)
            stack = _stacked if known else self.stack
            carry.append(stack(values, var.aval, scope, line))
        return carry

    def _while(self, equation, ins, scope, line):
        """Unroll a `while` whose condition does not depend on the input."""
        params = equation.params
        count, inner = params["cond_nconsts"], params["body_nconsts"]
        before, fixed = ins[:count], ins[count : count + inner]
        carry = ins[count + inner :]
        for at in range(_LONGEST_LOOP + 1):
            (again,) = self.run(params["cond_jaxpr"], [*before, *carry], scope, line)
            if not isinstance(again, Const):
                raise _LoopError(_DYNAMIC)
            if not again.value.item():
                return carry
            args, inside = [*fixed, *carry], f"{scope}/{at}"
            carry = self.run(params["body_jaxpr"], args, inside, line)
        raise _LoopError(f"expected at most {_LONGEST_LOOP} iterations")


class _Tracer(Interpreter):
    """An interpreter that makes a `Node` of each value that depends on the input."""

    def evaluate(self, equation, ins, scope):
        if equation.primitive.name != "platform_index":
            return super().evaluate(equation, ins, scope)
        platforms = list(equation.params["platforms"])
        if None not in platforms:
            raise PackError(
                f"pack: lax.platform_dependent without a default{_at(scope)}"
            )
        return [Const(np.array(platforms.index(None), np.int32), ())]

    def apply(self, equation, ins, scope, line):
        name, params = equation.primitive.name, equation.params
        where = f"pack: {name}{_at(scope)} ({line})"
        if any(_RANDOM_SOURCE in i.sources for i in ins if isinstance(i, Const)):
            raise PackError(
                f"{where} combines random numbers with the input, as dropout does in "
                "training mode; call model.eval() first"
            )
        if name in LOOPS:
            try:
                return self.unroll(equation, ins, scope, line)
            except _LoopError as error:
                raise PackError(f"{where}: {error}") from None
        if name == "cond":
            raise PackError(f"{where}: {_DYNAMIC}")
        if name == "select_n" and isinstance(ins[0], Const) and ins[0].value.size == 1:
            return [ins[1 + int(ins[0].value.item())]]  # such as the NaN of `jnp.var`
        if name == "concatenate":
            ins = [i for i in ins if i.shape[params["dimension"]]]
            if len(ins) == 1:
                return ins
        if name in _OPAQUE:
            raise PackError(
                f"{where} is opaque; build the model with backend='auto', or write it "
                "in jax.numpy"
            )
        outs = []
        for at, var in enumerate(equation.outvars):
            attrs = dict(params)
            if name in _RUN_ON_INDICES:
                attrs = {"primitive": equation.primitive, "original": dict(params)}
            if equation.primitive.multiple_results:
                attrs["result"] = at
            shape, dtype = tuple(var.aval.shape), var.aval.dtype
            node = Node(name, list(ins), attrs, shape, dtype, scope, line)
            node.primitive = name
            outs.append(node)
        return outs

    def row(self, value, at, scope, line):
        shape = (1, *value.shape[1:])
        attrs = {
            "start_indices": (at, *(0 for _ in value.shape[1:])),
            "limit_indices": (at + 1, *value.shape[1:]),
            "strides": None,
        }
        row = Node("slice", [value], attrs, shape, value.dtype, scope, line)
        row.primitive = "scan"
        return Node("squeeze", [row], {}, value.shape[1:], value.dtype, scope, line)

    def stack(self, values, aval, scope, line):
        shape, dtype = tuple(aval.shape), aval.dtype
        made = Node("stack", values, {"axis": 0}, shape, dtype, scope, line)
        made.primitive = "scan"
        return made


def _stacked(values: Sequence[Const], aval: Any, *_: str) -> Const:
    """Constants along a new first axis; `aval` has the shape and dtype."""
    sources = frozenset().union(*(v.sources for v in values))
    rows = [v.full() for v in values]
    rows = np.stack(rows) if rows else np.zeros(aval.shape, aval.dtype)
    return constant(rows, sources)


def constant(value: Any, sources: frozenset[str] = frozenset()) -> Const:
    """Convert a value to a `Const`; a `Const` is returned unchanged."""
    if isinstance(value, Const):
        return value
    if jnp.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
        # NumPy has no dtype for a PRNG key: store it as an object.
        key = np.empty((), object)
        key[()] = value
        return Const(key, tuple(value.shape), sources)
    value = np.asarray(value)
    return Const(compact(value), value.shape, sources)


def _by_numpy(equation: Any, ins: Sequence[Const]) -> np.ndarray | None:
    """Evaluate by NumPy to save a compilation; None if XLA might round differently."""
    name, params = equation.primitive.name, equation.params
    if any(const.dtype == object for const in ins):
        return None
    if name in _MOVES:
        return _moved(name, params, equation.outvars[0].aval.shape, ins)
    if name == "convert_element_type":
        if np.dtype(params["new_dtype"]) != np.float32 or ins[0].dtype not in _WIDENED:
            return None
        return ins[0].full().astype(np.float32)
    function = _ELEMENTWISE.get(name)
    kinds = {const.dtype for const in ins}
    if function is None or not kinds <= {np.dtype(np.float32), np.dtype(bool)}:
        return None
    if len(ins) == 3 and ins[0].dtype != bool:
        return None
    with np.errstate(all="ignore"):
        value = function(*(const.value for const in ins))
    if any(_subnormal(x) for x in (value, *(const.value for const in ins))):
        return None  # XLA flushes subnormals to zero.
    return np.broadcast_to(value, equation.outvars[0].aval.shape)


def _subnormal(x: np.ndarray) -> bool:
    if x.dtype == bool:
        return False
    return bool(((np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0)).any())


def _moved(
    name: str, params: Any, shape: tuple[int, ...], ins: Sequence[Const]
) -> np.ndarray | None:
    """Evaluate one of `_MOVES`; None if its parameters are not supported."""
    x = ins[0].full()
    if name == "broadcast_in_dim":
        if len(ins) > 1:
            return None
        wide = [1] * len(shape)
        for at, d in zip(params["broadcast_dimensions"], x.shape, strict=True):
            wide[at] = d
        return np.broadcast_to(x.reshape(wide), shape)
    if name == "transpose":
        return x.transpose(params["permutation"])
    if name == "slice":
        limits = params["start_indices"], params["limit_indices"]
        strides = params["strides"] or (1,) * x.ndim
        return x[tuple(slice(*at) for at in zip(*limits, strides, strict=True))]
    if name == "pad":
        config = params["padding_config"]
        if any(low < 0 or high < 0 or inner for low, high, inner in config):
            return None
        widths = [(low, high) for low, high, _ in config]
        return np.pad(x, widths, constant_values=ins[1].full())
    permuted = name == "reshape" and params["dimensions"] is not None
    return None if permuted or len(ins) > 1 else x.reshape(shape)


def _at(scope: str) -> str:
    return f" at {scope}" if scope else ""


def _check_reduction(node: Node, other: Node) -> None:
    """Refuse a reduction over the batch."""
    if "axes" not in node.attrs or not node.op.startswith(("reduce_", "arg")):
        return
    (x,), (y,) = node.ins, other.ins
    if any(x.shape[axis] != y.shape[axis] for axis in node.attrs["axes"]):
        raise PackError(
            f"pack: {node.op} {node.place} reduces over the batch, as BatchNorm in "
            "training mode does; call model.eval() first"
        )


def _unify_nodes(node: Node, other: Node) -> None:
    node.shape = _unify(node, node.shape, other.shape)
    node.attrs = {
        key: value if key in _UNCOMPARED else _unify(node, value, other.attrs[key])
        for key, value in node.attrs.items()
    }
    for a, b in zip(node.ins, other.ins, strict=True):
        if not isinstance(a, Const) or not isinstance(b, Const):
            continue
        if a.value.shape != b.value.shape or not _same(a.value, b.value):
            raise _batch_dependence(node)
        if all(d >= 0 for d in a.shape):  # else unified already, for another user
            a.shape = _unify(node, a.shape, b.shape)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _batch_dependence(node: Node, values: str = "") -> PackError:
    what = f"{node.primitive or node.op} {node.place}"
    return PackError(f"pack: {what}: the program depends on the batch size{values}")


def _unify(node: Node, a: Any, b: Any) -> Any:
    """Merge a parameter of two traces; multiples of the batch size become negative."""
    if isinstance(a, bool | np.bool_ | str) or a is None:
        if a != b:
            raise _batch_dependence(node)
        return a
    if isinstance(a, int | np.integer):
        a, b = int(a), int(b)
        if a == b:
            return a
        if a % BATCH_SIZES[0] == 0 and a * BATCH_SIZES[1] == b * BATCH_SIZES[0]:
            return -(a // BATCH_SIZES[0])
        sizes = f": got {a} for {BATCH_SIZES[0]} images and {b} for {BATCH_SIZES[1]}"
        raise _batch_dependence(node, sizes)
    if isinstance(a, tuple | list) and len(a) == len(b):
        made = [_unify(node, p, q) for p, q in zip(a, b, strict=True)]
        return type(a)(*made) if hasattr(a, "_fields") else tuple(made)
    return a
