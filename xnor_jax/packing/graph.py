"""The operations of a packed network, each declared once.

A graph is a sequence of nodes. Value 0 is the input and value `i` is the result of node
`i − 1`; a node lists the values that it reads. A value is packed signs, float32 or
bool, with the batch as its first axis. The file format, the report, execution in JAX
and the shape checks all use the same declaration of a node:

* fields: its settings, each with a check for values read from a file;
* `members`: the names, kinds and shapes of its arrays;
* `out`: the shape and dtype of its result, or a ValueError;
* `__call__`: its computation in JAX.

The engine declares the same nodes in engine/nodes.cc, windows.cc and moves.cc.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xnor_jax import convolution, ops
from xnor_jax.geometry import Geometry, Pads, conv_geometry, pool_geometry
from xnor_jax.ops import Affine, Bits, Epilogue, Threshold
from xnor_jax.packing import checks
from xnor_jax.packing.functions import (
    ARITIES,
    FUNCTIONS,
    LOGICAL,
    PREDICATES,
    apply_function,
)

T = TypeVar("T")
Value = jax.Array | Bits

AFFINE, RELU, THRESHOLD = EPILOGUES = ("affine", "affine_relu", "threshold")

# Node classes by kind, the name used in a file.
NODES: dict[str, type["Node"]] = {}


class Spec(NamedTuple):
    """Shape and dtype of a value, for one image."""

    shape: tuple[int, ...]  # without the batch
    dtype: str = "float32"  # or "bits", along the last axis, or "bool"

    @property
    def bits(self) -> bool:
        """Whether the value is packed signs."""
        return self.dtype == "bits"


class Member(NamedTuple):
    """Kind and shape of one of a node's arrays.

    Attributes:
      kind: `"floats"`, finite; `"reals"`, which may be infinite; `"integers"` of
        magnitude at most `bound`; `"indices"` below `bound`; `"flip"`, one sign per
        channel; `"kernel"`, signs.
      shape: The array's shape; for signs, the shape before packing.
      bound: The largest magnitude of integers; the upper bound of indices, exclusive.
      groups: Groups of a kernel, of signs or of floats; 0 for other arrays.
    """

    kind: str
    shape: tuple[int, ...]
    bound: int = 0
    groups: int = 0

    @property
    def stored(self) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and dtype of the array in a file."""
        if self.kind in ("kernel", "flip"):
            return (-(-prod(self.shape) // 8),), np.dtype("u1")
        if self.kind == "integers":
            small = self.bound <= np.iinfo(np.int16).max
            return self.shape, np.dtype("<i2" if small else "<i4")
        return self.shape, np.dtype("<i4" if self.kind == "indices" else "<f4")

    @property
    def stored_bytes(self) -> int:
        """The size of the array in a file."""
        shape, dtype = self.stored
        return prod(shape) * dtype.itemsize


def _threshold_members(
    kind: str, channels: tuple[int, ...], bound: int = 0
) -> dict[str, Member]:
    flip = Member("flip", channels)
    return {"threshold": Member(kind, channels, bound), "flip": flip}


def setting(check: Callable[[Any], Any], default: Any = None) -> Any:
    """Declare a static field, with a check for values read from a file."""
    return field(default=default, metadata={"static": True, "check": check})


@dataclass_transform(
    eq_default=False,
    kw_only_default=True,
    frozen_default=True,
    field_specifiers=(field,),
)
def _node(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and a pytree; add it to `NODES` by its kind."""
    made: Any = dataclass(frozen=True, kw_only=True, eq=False)(cls)
    if "kind" in vars(made):
        NODES[made.kind] = made
    return jax.tree_util.register_dataclass(made)


def _sizes(least: int) -> Callable[[Any], tuple[int, ...]]:
    return partial(checks.integers, least=least)


def _pads(value: Any) -> Pads:
    if not isinstance(value, list) or len(value) > 8:
        raise ValueError(f"expected a list of pairs, got {checks.clip(value)}")
    pairs = [checks.integers(pair, length=2) for pair in value]
    return tuple((before, after) for before, after in pairs)


def _choice(choices: Sequence[Any]) -> Callable[[Any], Any]:
    return partial(checks.one_of, choices=choices)


@_node
class Node:
    """One operation of a packed network.

    Attributes:
      inputs: Indices of the values that it reads.
      name: The layer's path in the model, or its scope in the program.
      parameters: Number of the float model's parameters that it replaces.
      arrays: Its arrays, by the names of `members`.
    """

    kind: ClassVar[str]
    inputs: tuple[int, ...] = setting(_sizes(0), ())
    name: str = setting(checks.string, "")
    parameters: int = setting(partial(checks.integer, largest=2**40), 0)
    arrays: dict[str, Any] = field(default_factory=dict)

    def members(self, specs: Sequence[Spec]) -> dict[str, Member]:
        """The arrays that the node needs for inputs of these shapes and dtypes.

        Raises:
          ValueError: If the inputs do not fit the node.
        """
        return {}

    def out(self, specs: Sequence[Spec]) -> Spec:
        """The shape and dtype of the result for inputs of these shapes and dtypes.

        Raises:
          ValueError: If the inputs do not fit the node.
        """
        raise NotImplementedError

    def __call__(self, args: Sequence[Any], backend: str) -> Any:
        """Compute the result for a batch."""
        raise NotImplementedError

    def macs(self, specs: Sequence[Spec]) -> int:
        """Number of multiply-accumulates for one image."""
        return 0

    @property
    def _threshold(self) -> Threshold:
        """The threshold of the sums, for a node whose result is signs."""
        return Threshold(self.arrays["threshold"], self.arrays["flip"])

    @property
    def weights(self) -> int:
        """Number of weights in the kernel."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """The kind and settings for JSON; defaults are left out."""
        found: dict[str, Any] = {"kind": self.kind}
        for name, setting in self.settings().items():
            value = getattr(self, name)
            if value != setting.default:
                found[name] = _plain(value)
        return found

    @classmethod
    def checked(cls, found: dict[str, Any]) -> dict[str, Any]:
        """Check a node's JSON, each setting on its own; return the settings.

        Raises:
          ValueError: If a setting is unknown or out of its range.
        """
        settings = cls.settings()
        given = {k: v for k, v in found.items() if k != "kind"}
        wanted = {k: settings[k].metadata["check"] for k in given if k in settings}
        return checks.fields(given, wanted)

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """The dataclass fields except `arrays`, by name."""
        return {f.name: f for f in fields(cls) if f.name != "arrays"}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    # JSON has no infinity: −inf, a max-pool's padding, is stored as null.
    return None if value == -np.inf else value


def _one(inputs: Sequence[T]) -> T:
    if len(inputs) != 1:
        raise ValueError(f"expected one input, got {len(inputs)}")
    return inputs[0]


def _expect(spec: Spec, dtype: str) -> Spec:
    if spec.dtype != dtype:
        raise ValueError(f"expected {dtype}, got {spec.dtype}")
    return spec


def _floats(spec: Spec) -> Spec:
    """The spec of numbers, floats or signs, as float32."""
    if spec.dtype == "bool":
        raise ValueError("expected numbers, got bool")
    return spec._replace(dtype="float32")


def _with_channels(spec: Spec) -> Spec:
    if not spec.shape:
        raise ValueError("expected channels, got a scalar")
    return spec


def as_floats(x: Value) -> jax.Array:
    """Unpack signs to float32; return floats and bool unchanged."""
    return ops.unpack_bits(x.words, x.size) if isinstance(x, Bits) else x


def as_bits(x: Value, backend: str) -> Bits:
    """Pack floats to their signs; return bits unchanged."""
    return x if isinstance(x, Bits) else ops.sign_bits(x, backend=backend)


def _limit_padded(geometry: Geometry) -> Geometry:
    sizes = zip(geometry.spatial, geometry.padding, strict=True)
    padded = prod(size + sum(pads) for size, pads in sizes)
    checks.limit("positions in a padded image", padded, checks.LARGEST_IMAGE)
    return geometry


@_node
class _Product(Node):
    """A convolution or, without a window, a dense layer over the last axis."""

    window: tuple[int, ...] = setting(_sizes(1), ())
    features: int = setting(partial(checks.integer, least=1), 1)
    strides: tuple[int, ...] = setting(_sizes(1), ())
    padding: Pads = setting(_pads, ())
    dilation: tuple[int, ...] = setting(_sizes(1), ())
    groups: int = setting(partial(checks.integer, least=1), 1)
    epilogue: str = setting(_choice(EPILOGUES), AFFINE)

    @property
    def geometry(self) -> dict[str, Any]:
        """Strides, padding and dilation."""
        names = ("strides", "padding", "dilation")
        return {name: getattr(self, name) for name in names}

    def _kernel_shape(self, spec: Spec) -> tuple[int, ...]:
        each, rest = divmod(_with_channels(spec).shape[-1], self.groups)
        if rest or not each or self.features % self.groups:
            raise ValueError(
                f"expected channels that divide into {self.groups} groups, got "
                f"{spec.shape[-1]} and {self.features}"
            )
        if len(self.window) > 3 or (self.groups > 1 and not self.window):
            raise ValueError(
                "expected at most 3 spatial axes, and groups=1 for a dense layer"
            )
        shape = (*self.window, each, self.features)
        checks.limit("weights in a kernel", prod(shape), checks.LARGEST_KERNEL)
        return shape

    def out(self, specs: Sequence[Spec]) -> Spec:
        spec = _one(specs)
        self._kernel_shape(spec)
        dtype = "bits" if self.epilogue == THRESHOLD else "float32"
        if not self.window:
            if self.strides or self.padding or self.dilation:
                raise ValueError(
                    "expected no strides, padding or dilation for a dense layer"
                )
            return Spec((*spec.shape[:-1], self.features), dtype)
        geometry = conv_geometry(
            self.kind, spec.shape[:-1], self.window, **self.geometry
        )
        return Spec((*_limit_padded(geometry).out, self.features), dtype)

    def macs(self, specs: Sequence[Spec]) -> int:
        return prod(self.out(specs).shape[:-1]) * prod(self._kernel_shape(specs[0]))

    @property
    def affine(self) -> Affine:
        """The epilogue of a product without a threshold."""
        scale, bias = self.arrays["scale"], self.arrays["bias"]
        return Affine(scale, bias, relu=self.epilogue == RELU)

    def _epilogue(self) -> Epilogue:
        if self.epilogue == THRESHOLD:
            return self._threshold
        return self.affine


@_node
class BinaryConv(_Product):
    """A convolution or dense layer of signs, with an epilogue on the integer sums."""

    kind = "binary_conv"

    def members(self, specs):
        """A kernel of signs, and per channel α and a bias, or an integer threshold."""
        shape = self._kernel_shape(_expect(_one(specs), "bits"))
        found = {"kernel": Member("kernel", shape, groups=self.groups)}
        if self.epilogue == THRESHOLD:
            bound = prod(shape[:-1])
            return found | _threshold_members("integers", shape[-1:], bound)
        return found | {
            name: Member("floats", shape[-1:]) for name in ("scale", "bias")
        }

    def __call__(self, args, backend):
        """Map bits `[N, *spatial, C]` to float32 or bits `[N, *out, features]`."""
        x, kernel = as_bits(args[0], backend), self.arrays["kernel"]
        if not self.window:
            return ops.packed_matmul(x, kernel, self._epilogue(), backend=backend)
        return ops.packed_conv(
            x,
            kernel,
            self._epilogue(),
            **self.geometry,
            groups=self.groups,
            backend=backend,
        )

    @property
    def weights(self) -> int:
        """Number of weights in the kernel."""
        kernel = self.arrays["kernel"]
        return prod((*self.window, kernel.in_features, kernel.out_features))


@_node
class Conv(_Product):
    """A convolution or dense layer of real numbers; if scaled, followed by a BatchNorm.

    The result is `sums + bias`, or `(sums + bias) · scale + shift`.
    """

    kind = "conv"
    scaled: bool = setting(_choice((False, True)), False)

    def members(self, specs):
        """A kernel, and per channel a bias, a scale and a shift, or a threshold."""
        shape = self._kernel_shape(_floats(_one(specs)))
        found = {"kernel": Member("floats", shape, groups=self.groups)}
        if self.epilogue == THRESHOLD:
            if self.scaled:
                raise ValueError("expected no scale with a threshold")
            return found | _threshold_members("reals", shape[-1:])
        names = ("bias", "scale", "shift") if self.scaled else ("bias",)
        return found | {name: Member("floats", shape[-1:]) for name in names}

    def __call__(self, args, backend):
        """Map float32 `[N, *spatial, C]` to float32 or bits `[N, *out, features]`."""
        x, kernel = as_floats(args[0]), self.arrays["kernel"]
        epilogue = self._epilogue()
        if not self.window:
            y = ops.apply_epilogue(convolution.dot(x, kernel), epilogue)
            y = Bits(y, self.features) if self.epilogue == THRESHOLD else y
        else:
            y = ops.real_conv(
                x,
                kernel,
                epilogue,
                **self.geometry,
                groups=self.groups,
                backend="xla",
            )
        return self.normalized(y) if self.scaled else y

    def normalized(self, y: Any) -> Any:
        """Scale and shift biased sums, and apply the ReLU."""
        y = y * self.arrays["scale"] + self.arrays["shift"]
        return jax.nn.relu(y) if self.epilogue == RELU else y

    @property
    def affine(self) -> Affine:
        """The bias; without a scale that follows, also the ReLU."""
        bias = self.arrays["bias"]
        relu = self.epilogue == RELU and not self.scaled
        return Affine(jnp.ones_like(bias), bias, relu=relu)

    @property
    def weights(self) -> int:
        """Number of weights in the kernel."""
        return self.arrays["kernel"].size


@_node
class Sign(Node):
    """The sign per channel: −1 where `(x < threshold) xor flip`, else +1."""

    kind = "sign"

    def members(self, specs):
        """One threshold and one flip bit per channel."""
        return _threshold_members("reals", self.out(specs).shape[-1:])

    def out(self, specs):
        """Bits of the same shape."""
        return _with_channels(_floats(_one(specs)))._replace(dtype="bits")

    def __call__(self, args, backend):
        """Map float32 `[N, ..., C]` to bits."""
        x = as_floats(args[0])
        return Bits(ops.apply_epilogue(x, self._threshold), x.shape[-1])


@_node
class _Pool(Node):
    window: tuple[int, ...] = setting(_sizes(1), ())
    strides: tuple[int, ...] = setting(_sizes(1), ())
    padding: Pads = setting(_pads, ())

    @property
    def geometry(self) -> dict[str, Any]:
        """Window, strides and padding."""
        names = ("window", "strides", "padding")
        return {name: getattr(self, name) for name in names}

    def _pooled(self, spec: Spec) -> tuple[int, ...]:
        if not 2 <= len(spec.shape) <= 4:
            raise ValueError(f"expected 1 to 3 spatial axes, got shape {spec.shape}")
        return (*_limit_padded(self.windows(spec.shape)).out, spec.shape[-1])

    def windows(self, shape: Sequence[int]) -> Geometry:
        """The windows over an image `[*spatial, C]`.

        Raises:
          ValueError: If they do not fit.
        """
        return pool_geometry(self.kind, shape[:-1], **self.geometry)


@_node
class MaxPoolBits(_Pool):
    """The signs of a max-pool, from the signs of its input: `ops.pool_bits`."""

    kind = "max_pool_bits"

    def members(self, specs):
        """One bit per channel: whether the function after the pool falls."""
        return {"flip": Member("flip", self.out(specs).shape[-1:])}

    def out(self, specs):
        """Bits at the output positions."""
        return Spec(self._pooled(_expect(_one(specs), "bits")), "bits")

    def __call__(self, args, backend):
        """Map bits `[N, *spatial, C]` to bits `[N, *out, C]`."""
        x = as_bits(args[0], backend)
        return ops.pool_bits(x, self.arrays["flip"], **self.geometry)


@_node
class SumPoolBits(_Pool):
    """The sign of each window's sum: an average-pool with a threshold."""

    kind = "sum_pool_bits"

    def members(self, specs):
        """One threshold and one flip bit per channel."""
        return _threshold_members("reals", self.out(specs).shape[-1:])

    def out(self, specs):
        """Bits at the output positions."""
        spec = _floats(_one(specs))
        if len(spec.shape) != 3:
            raise ValueError(f"expected 2 spatial axes, got shape {spec.shape}")
        return Spec(self._pooled(spec), "bits")

    def __call__(self, args, backend):
        """Map float32 `[N, H, W, C]` to bits `[N, *out, C]`."""
        x = as_floats(args[0])
        return ops.sum_pool_bits(x, self._threshold, **self.geometry, backend="xla")


@_node
class Pool(_Pool):
    """The maximum, minimum or sum of each window, as floats."""

    kind = "pool"
    function: str = setting(_choice(("max", "min", "sum")), "max")

    def out(self, specs):
        """Floats at the output positions."""
        spec = _floats(_one(specs))
        return Spec(self._pooled(spec))

    def __call__(self, args, backend):
        """Map float32 `[N, *spatial, C]` to `[N, *out, C]`."""
        x = as_floats(args[0])
        geometry = self.windows(x.shape[1:])
        if self.function == "sum":
            return convolution.sum_pool(x, geometry)
        if self.function == "min":
            return -convolution.max_pool(-x, geometry)
        return convolution.max_pool(x, geometry)


@_node
class Norm(Node):
    """BatchNorm in evaluation: `(x − mean) · scale + bias`, per channel."""

    kind = "norm"

    def members(self, specs):
        """Three numbers per channel."""
        channels = self.out(specs).shape[-1:]
        names = ("mean", "scale", "bias")
        return {name: Member("floats", channels) for name in names}

    def out(self, specs):
        """Floats of the same shape."""
        return _with_channels(_floats(_one(specs)))

    def __call__(self, args, backend):
        """Map float32 `[N, ..., C]` to the same shape."""
        a = self.arrays
        return (as_floats(args[0]) - a["mean"]) * a["scale"] + a["bias"]


@_node
class Mean(Node):
    """The mean over all positions of an image, summed sequentially."""

    kind = "mean"

    def out(self, specs):
        """Floats `[C]`."""
        spec = _floats(_one(specs))
        if not 2 <= len(spec.shape) <= 4:
            raise ValueError(f"expected 1 to 3 spatial axes, got shape {spec.shape}")
        return Spec(spec.shape[-1:])

    def __call__(self, args, backend):
        """Map float32 `[N, *spatial, C]` to `[N, C]`."""
        x = as_floats(args[0])
        spatial = x.shape[1:-1]
        whole = pool_geometry(self.kind, spatial, spatial, strides=1, padding="VALID")
        return convolution.mean_pool(x, whole).reshape(x.shape[0], x.shape[-1])


def _function(value: Any) -> str:
    if not isinstance(value, str) or value not in FUNCTIONS:
        raise ValueError(
            f"unknown function {checks.clip(value)}; pack the network again, or update "
            "xnor_jax"
        )
    return value


@_node
class Elementwise(Node):
    """An elementwise function of values and constants, with broadcasting.

    Attributes:
      function: One of `FUNCTIONS`.
      operands: Each operand's index in `inputs`, or −1 for a constant.
      shapes: Each constant's shape, without a batch; `()` for the other operands.
      exponent: The power of `integer_pow`.
    """

    kind = "elementwise"
    function: str = setting(_function, "add")
    operands: tuple[int, ...] = setting(_sizes(-1), ())
    shapes: tuple[tuple[int, ...], ...] = setting(
        lambda value: tuple(
            checks.integers(shape, least=1) for shape in checks.sequence(value, 3)
        ),
        (),
    )
    exponent: int = setting(partial(checks.integer, least=-64, largest=64), 0)

    def members(self, specs):
        """The constants."""
        self.out(specs)
        return {
            f"constant{at}": Member("reals", self.shapes[at])
            for at, operand in enumerate(self.operands)
            if operand < 0
        }

    def out(self, specs):
        """Floats or bool of the broadcast shape."""
        name, count = self.function, ARITIES[self.function]
        if not len(self.operands) == len(self.shapes) == count:
            raise ValueError(f"{name}: expected {count} operands")
        if sorted({o for o in self.operands if o >= 0}) != list(range(len(specs))):
            raise ValueError(f"{name}: expected every input among the operands")
        if not specs:
            raise ValueError(f"{name}: expected an input")
        shapes, rank = [], max(len(s.shape) for s in specs)
        for at, operand in enumerate(self.operands):
            spec = Spec(self.shapes[at]) if operand < 0 else specs[operand]
            wanted = ("float32", "bits")
            if name in LOGICAL or (name == "select" and at == 0) or name == "to_float":
                wanted = ("bool",)
                if operand < 0:
                    raise ValueError(f"{name}: expected bool, got a constant")
            if spec.dtype not in wanted:
                raise ValueError(f"{name}: expected {wanted[0]}, got {spec.dtype}")
            if len(spec.shape) > rank:
                raise ValueError(f"{name}: expected a constant of at most {rank} axes")
            shapes.append(spec.shape)
        for spec in specs:
            if len(spec.shape) != rank:
                raise ValueError(f"{name}: expected inputs of the same rank")
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError:
            raise ValueError(f"{name}: the shapes {shapes} do not broadcast") from None
        return Spec(tuple(shape), "bool" if name in PREDICATES else "float32")

    def __call__(self, args, backend):
        """Map values `[N, ...]` to one value `[N, ...]`."""
        values = [
            self.arrays[f"constant{at}"] if operand < 0 else as_floats(args[operand])
            for at, operand in enumerate(self.operands)
        ]
        return apply_function(self.function, values, self.exponent)


@_node
class Reduce(Node):
    """The sum, maximum or minimum over axes, counted with the batch as axis 0."""

    kind = "reduce"
    function: str = setting(_choice(("sum", "max", "min")), "sum")
    axes: tuple[int, ...] = setting(_sizes(1), ())

    def out(self, specs):
        """Floats without these axes."""
        spec = _floats(_one(specs))
        if len(set(self.axes)) != len(self.axes) or any(
            axis > len(spec.shape) for axis in self.axes
        ):
            raise ValueError(
                f"expected distinct axes of shape {spec.shape}, got {self.axes}"
            )
        left = [d for at, d in enumerate(spec.shape, 1) if at not in self.axes]
        return Spec(tuple(left))

    def __call__(self, args, backend):
        """Map `[N, ...]` to `[N, ...]` without the axes."""
        function = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}[self.function]
        return function(as_floats(args[0]), axis=self.axes)


@_node
class _Move(Node):
    """A node that only moves values; signs stay bits."""

    def out(self, specs):
        if not specs:
            raise ValueError("expected an input")
        dtypes = {spec.dtype for spec in specs}
        bits = dtypes == {"bits"} and self._keeps_signs()
        if "bool" in dtypes and len(dtypes) > 1:
            raise ValueError("expected bool in all inputs or in none")
        shape = self._shape([spec.shape for spec in specs])
        if bits and not shape:
            raise ValueError("expected bits with channels")
        dtype = "bits" if bits else "bool" if "bool" in dtypes else "float32"
        return Spec(shape, dtype)

    def __call__(self, args, backend):
        y = self._move([as_floats(x) for x in args])
        bits = all(isinstance(x, Bits) for x in args) and self._keeps_signs()
        return ops.sign_bits(y, backend=backend) if bits else y

    def _keeps_signs(self) -> bool:
        return True

    def _shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        raise NotImplementedError

    def _move(self, args: list[jax.Array]) -> jax.Array:
        raise NotImplementedError


@_node
class Reshape(_Move):
    """A reshape of each image."""

    kind = "reshape"
    shape: tuple[int, ...] = setting(_sizes(1), ())

    def _shape(self, shapes):
        if prod(_one(shapes)) != prod(self.shape):
            raise ValueError(
                f"expected {prod(shapes[0])} numbers, got shape {self.shape}"
            )
        return self.shape

    def _move(self, args):
        return args[0].reshape(args[0].shape[0], *self.shape)

    def __call__(self, args, backend):
        """Reshape a batch; bits keep their words if the last axis is unchanged."""
        x = args[0]
        if isinstance(x, Bits) and self.shape and x.size == self.shape[-1]:
            words = x.words
            last = words.shape[-1]
            return Bits(words.reshape(words.shape[0], *self.shape[:-1], last), x.size)
        return super().__call__(args, backend)


@_node
class Transpose(_Move):
    """A permutation of the axes; the batch, axis 0, stays first."""

    kind = "transpose"
    order: tuple[int, ...] = setting(_sizes(1), ())

    def _shape(self, shapes):
        shape = _one(shapes)
        if sorted(self.order) != list(range(1, len(shape) + 1)):
            raise ValueError(
                f"expected a permutation of axes 1 to {len(shape)}, got {self.order}"
            )
        return tuple(shape[axis - 1] for axis in self.order)

    def _move(self, args):
        return args[0].transpose(0, *self.order)


@_node
class Broadcast(_Move):
    """A broadcast of axes of size 1."""

    kind = "broadcast"
    shape: tuple[int, ...] = setting(_sizes(1), ())

    def _shape(self, shapes):
        shape = _one(shapes)
        if len(shape) != len(self.shape) or any(
            a not in (1, b) for a, b in zip(shape, self.shape, strict=True)
        ):
            raise ValueError(f"{shape} does not broadcast to {self.shape}")
        return self.shape

    def _move(self, args):
        return jnp.broadcast_to(args[0], (args[0].shape[0], *self.shape))


@_node
class Slice(_Move):
    """A strided slice of each axis except the batch."""

    kind = "slice"
    start: tuple[int, ...] = setting(_sizes(0), ())
    stop: tuple[int, ...] = setting(_sizes(1), ())
    strides: tuple[int, ...] = setting(_sizes(1), ())

    def _shape(self, shapes):
        shape = _one(shapes)
        if not len(shape) == len(self.start) == len(self.stop) == len(self.strides):
            raise ValueError(f"expected start, stop and strides of {len(shape)} axes")
        axes = zip(shape, self.start, self.stop, self.strides, strict=True)
        if any(not start < stop <= size for size, start, stop, _ in axes):
            raise ValueError(f"expected start < stop <= size on each axis of {shape}")
        ends = zip(self.start, self.stop, self.strides, strict=True)
        return tuple(len(range(start, stop, stride)) for start, stop, stride in ends)

    def _move(self, args):
        x = args[0]
        limits = (x.shape[0], *self.stop)
        return lax.slice(x, (0, *self.start), limits, (1, *self.strides))


@_node
class Pad(_Move):
    """Constant padding of each axis except the batch."""

    kind = "pad"
    padding: Pads = setting(_pads, ())
    value: float = setting(lambda v: -np.inf if v is None else checks.real(v), 0.0)

    def _keeps_signs(self):
        return abs(self.value) == 1

    def _shape(self, shapes):
        shape = _one(shapes)
        if len(shape) != len(self.padding):
            raise ValueError(
                f"expected padding of {len(shape)} axes, got {len(self.padding)}"
            )
        return tuple(d + sum(p) for d, p in zip(shape, self.padding, strict=True))

    def _move(self, args):
        pads = ((0, 0), *self.padding)
        return jnp.pad(args[0], pads, constant_values=self.value)


@_node
class Concatenate(_Move):
    """Values concatenated along an axis, counted with the batch as axis 0."""

    kind = "concatenate"
    axis: int = setting(partial(checks.integer, least=1, largest=8), 1)

    def _shape(self, shapes):
        at, first = self.axis - 1, shapes[0]
        if at >= len(first):
            raise ValueError(f"expected at least {self.axis} axes, got shape {first}")
        for shape in shapes:
            if len(shape) != len(first) or any(
                a != b
                for d, (a, b) in enumerate(zip(shape, first, strict=True))
                if d != at
            ):
                raise ValueError(f"{shape} does not fit {first} along axis {self.axis}")
        size = sum(shape[at] for shape in shapes)
        return (*first[:at], size, *first[at + 1 :])

    def _move(self, args):
        return jnp.concatenate(args, self.axis)


@_node
class Take(_Move):
    """Entries of an image, gathered by their index in the flattened image."""

    kind = "take"
    shape: tuple[int, ...] = setting(_sizes(1), ())

    def members(self, specs):
        """The indices."""
        self.out(specs)
        return {"places": Member("indices", self.shape, prod(specs[0].shape))}

    def _shape(self, shapes):
        _one(shapes)
        return self.shape

    def _move(self, args):
        x = args[0].reshape(args[0].shape[0], -1)
        return jnp.take(x, self.arrays["places"], axis=1)


@_node
class Constant(Node):
    """The same array for each image; its input gives only the batch size."""

    kind = "constant"
    shape: tuple[int, ...] = setting(_sizes(1), ())

    def members(self, specs):
        """The array."""
        return {"value": Member("reals", self.shape)}

    def out(self, specs):
        """Floats."""
        _one(specs)
        return Spec(self.shape)

    def __call__(self, args, backend):
        """Return float32 `[N, *shape]`."""
        x = args[0].words if isinstance(args[0], Bits) else args[0]
        return jnp.broadcast_to(self.arrays["value"], (x.shape[0], *self.shape))


@_node
class MatMul(Node):
    """A matrix product of two values: `[N, ..., M, K] × [N, ..., K, P]`."""

    kind = "matmul"

    def out(self, specs):
        """Floats `[..., M, P]`."""
        if len(specs) != 2:
            raise ValueError(f"expected two inputs, got {len(specs)}")
        a, b = (_floats(spec).shape for spec in specs)
        if len(a) < 2 or len(a) != len(b) or a[:-2] != b[:-2] or a[-1] != b[-2]:
            raise ValueError(f"{a} cannot be multiplied by {b}")
        return Spec((*a[:-1], b[-1]))

    def __call__(self, args, backend):
        """Multiply the matrices of each image."""
        return jnp.matmul(*(as_floats(x) for x in args))

    def macs(self, specs):
        """Number of multiply-accumulates of floats for one image."""
        return prod(self.out(specs).shape) * specs[0].shape[-1]


# Nodes that move bits and floats alike.
MOVES = (Reshape, Transpose, Broadcast, Slice, Concatenate, Take)


def input_specs(node: Node, specs: Sequence[Spec]) -> list[Spec]:
    """The specs of a node's inputs, from those of all values before it.

    Raises:
      ValueError: If the node reads a later value.
    """
    if any(i >= len(specs) for i in node.inputs):
        raise ValueError(f"expected inputs from earlier nodes, got {node.inputs}")
    return [specs[i] for i in node.inputs]


def specs_of(nodes: Sequence[Node], image_shape: tuple[int, ...]) -> list[Spec]:
    """Each value's shape and dtype: the input, then the result of each node.

    Raises:
      ValueError: If a node reads a later value or one that does not fit it.
    """
    specs = [Spec(tuple(image_shape))]
    for at, node in enumerate(nodes):
        try:
            specs.append(node.out(input_specs(node, specs)))
        except ValueError as error:
            raise ValueError(f"node {at} ({node.kind} {node.name}): {error}") from None
    return specs
