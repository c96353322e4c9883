"""A stage as it stands in a file: its attributes in JSON, its arrays in little space.

Signs are stored without the padding that the products want: bit 1 for −1, least
significant bit first, in C order (a kernel's is `[*window, C_in / groups, C_out]`), the
last byte filled up with 0. Everything is exact: what comes back runs as what went in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax import ops
from xnor_jax.deploy import checks
from xnor_jax.deploy.stage import Spec, Stage
from xnor_jax.deploy.stages import STAGES
from xnor_jax.geometry import Pads
from xnor_jax.ops import Affine, Threshold

_CONVS = ("real", "binary", "scaled")
_POOLS = ("max_pool_bits", "sum_pool_bits", "pool")
_EPILOGUES = ("affine", "affine_relu", "threshold")
_LEAST = np.iinfo(np.int32).min


@dataclass(frozen=True)
class Member:
    """An array of a stage.

    Attributes:
      kind: Floats; signs; or a threshold on integer or on float sums.
      shape: Of the numbers, before signs are packed.
      bound: The largest magnitude of an integer sum.
    """

    kind: Literal["floats", "signs", "integers", "reals"]
    shape: tuple[int, ...]
    bound: int = 0

    @property
    def stored(self) -> jax.ShapeDtypeStruct:
        """Dtype and shape in the file."""
        if self.kind == "signs":
            return jax.ShapeDtypeStruct((-(-prod(self.shape) // 8),), np.uint8)
        if self.kind == "integers":
            small = self.bound < np.iinfo(np.int16).max
            return jax.ShapeDtypeStruct(self.shape, np.int16 if small else np.int32)
        return jax.ShapeDtypeStruct(self.shape, np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.stored.shape) * np.dtype(self.stored.dtype).itemsize

    def store(self, numbers: Any) -> np.ndarray:
        """Numbers as they stand in the file; signs come as ±1."""
        numbers = np.asarray(numbers)
        if self.kind == "signs":
            return np.packbits(numbers.ravel() < 0, bitorder="little")
        if self.kind == "integers":
            # Below the smallest sum every threshold is the same: always +1, or −1.
            numbers = np.maximum(numbers, -self.bound)
        return np.ascontiguousarray(numbers, self.stored.dtype)

    def restore(self, stored: np.ndarray) -> np.ndarray:
        """The numbers; signs as ±1.

        Raises:
          ValueError: If they are not what `store` gives.
        """
        if self.kind == "signs":
            bits = np.unpackbits(stored, bitorder="little")
            count = prod(self.shape)
            if bits[count:].any():
                raise ValueError("expected 0 in the unused bits")
            return np.where(bits[:count], np.float32(-1), np.float32(1)).reshape(
                self.shape
            )
        if self.kind == "integers":
            numbers = stored.astype(np.int32)
            if (np.abs(numbers) > self.bound).any():
                raise ValueError(f"expected thresholds of at most {self.bound}")
            return np.where(numbers == -self.bound, _LEAST, numbers)
        finite = np.isfinite(stored)
        if self.kind == "reals":
            finite |= stored == -np.inf
        if not finite.all():
            raise ValueError("expected finite numbers")
        return stored


def attributes(stage: Stage) -> dict[str, Any]:
    """What is no array, for JSON; defaults are left out."""
    layer: Any = stage
    found: dict[str, Any] = {"kind": stage.kind, "name": stage.name}
    found["parameters"] = stage.parameters
    if stage.kind in _CONVS + _POOLS:
        window = layer.shape[:-2] if stage.kind in _CONVS else layer.window
        found["window"] = list(window)
        found["strides"] = list(layer.strides)
        found["padding"] = [list(pair) for pair in layer.padding]
    if stage.kind in _CONVS:
        found["features"] = layer.shape[-1]
        found["dilation"] = list(layer.dilation)
        found["groups"] = layer.groups
    if stage.kind in ("real", "binary"):
        affine = isinstance(layer.epilogue, Affine)
        found["epilogue"] = _EPILOGUES[layer.epilogue.relu if affine else 2]
    if stage.kind == "pool":
        found["mean"] = layer.mean
    defaults = _defaults(found.get("window", ()))
    return {k: v for k, v in found.items() if k not in defaults or v != defaults[k]}


def complete(found: Any) -> dict[str, Any]:
    """The attributes that JSON gave, each checked for itself, with their defaults.

    Raises:
      ValueError: If one is missing, unknown, of another type or out of range.
    """
    kind = checks.mapping(found).get("kind")
    if not isinstance(kind, str) or kind not in STAGES:
        raise ValueError(f"unknown kind of stage {checks.clip(kind)}")
    wanted: dict[str, Callable[[Any], Any]] = {
        "kind": checks.string,
        "name": checks.string,
        "parameters": partial(checks.integer, largest=2**40),
    }
    window: tuple[int, ...] = ()
    if kind in _CONVS + _POOLS:
        window = checks.integers(found.get("window"), least=1)
        if len(window) > 3 or (kind in _POOLS and not window):
            raise ValueError(f"window: expected 1 to 3 axes, got {len(window)}")
    sizes = partial(checks.integers, least=1, length=len(window))
    if kind in _CONVS + _POOLS:
        wanted |= {"window": sizes, "strides": sizes}
        wanted["padding"] = partial(_pads, rank=len(window))
    if kind in _CONVS:
        one = partial(checks.integer, least=1)
        wanted |= {"features": one, "dilation": sizes, "groups": one}
    if kind in ("real", "binary"):
        wanted["epilogue"] = partial(checks.one_of, choices=_EPILOGUES)
    if kind == "pool":
        wanted["mean"] = partial(checks.one_of, choices=(False, True))
    defaults = {k: v for k, v in _defaults(window).items() if k in wanted}
    return checks.fields(defaults | found, wanted)


def members(found: dict[str, Any], spec: Spec) -> dict[str, Member]:
    """The arrays of a stage with these attributes, by name.

    Args:
      found: As `complete` gives them.
      spec: What the stage gets.

    Raises:
      ValueError: If the channels do not divide into the groups.
    """
    kind, channels = found["kind"], spec.shape[-1]
    result: dict[str, Member] = {}
    threshold, bound = kind == "sum_pool_bits", 0
    if kind in _CONVS:
        each, rest = divmod(channels, found["groups"])
        channels = found["features"]
        if found["groups"] > 1 and not found["window"]:
            raise ValueError(
                f"expected a dense layer of 1 group, got {found['groups']}"
            )
        if rest or channels % found["groups"]:
            raise ValueError(
                f"expected {spec.shape[-1]} and {channels} channels that divide into "
                f"{found['groups']} groups"
            )
        shape = (*found["window"], each, channels)
        real = kind == "real"
        result["kernel"] = Member("floats" if real else "signs", shape)
        bound = 0 if real else prod(shape[:-1])
        threshold = found.get("epilogue") == "threshold"
        if not threshold:
            result["bias"] = Member("floats", (channels,))
            if not real:
                result["scale"] = Member("floats", (channels,))
    if kind == "norm":
        names = ("mean", "scale", "bias")
        result |= {name: Member("floats", (channels,)) for name in names}
    if threshold:
        sums = "integers" if bound else "reals"
        result["threshold"] = Member(sums, (channels,), bound)
    if threshold or kind == "max_pool_bits":
        result["flip"] = Member("signs", (channels,))
    return result


def numbers(stage: Stage, spec: Spec) -> dict[str, Any]:
    """The stage's arrays by the names of `members`, signs as ±1.

    Raises:
      ValueError: If it holds what `xnor_jax.pack` never makes.
    """
    layer: Any = stage
    result: dict[str, Any] = {}
    if stage.kind in _CONVS:
        result["kernel"] = layer.kernel
        if stage.kind != "real":
            result["kernel"] = ops.unpack_kernel(layer.kernel)
    holder = getattr(layer, "epilogue", getattr(layer, "threshold", layer))
    for name in ("threshold", "flip", "mean", "scale", "bias"):
        if hasattr(holder, name):
            result[name] = getattr(holder, name)
    if "flip" in result:
        channels = layer.out(spec).shape[-1]
        result["flip"] = ops.unpack_bits(result["flip"], channels)
    # A real layer's sums are their own; the file does not keep a scale of ones.
    if stage.kind == "real" and "scale" in result:
        if not bool((result.pop("scale") == 1).all()):
            raise ValueError(f"save: {stage.name}: expected a scale of ones")
    return result


def build(found: dict[str, Any], arrays: dict[str, Any]) -> Stage:
    """The stage of these attributes and numbers; also under `jax.eval_shape`.

    Args:
      found: As `complete` gives them.
      arrays: As `numbers` gives them.
    """
    settings = {k: v for k, v in found.items() if k not in ("kind", "epilogue")}
    kind = found["kind"]
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    if "flip" in arrays:
        arrays["flip"] = ops.pack_bits(arrays["flip"])
    if kind in _CONVS:
        del settings["window"], settings["features"]
        settings["kernel"] = arrays["kernel"]
        if kind != "real":
            settings["kernel"] = ops.pack_kernel(arrays["kernel"], found["groups"])
    if kind in ("real", "binary"):
        settings["epilogue"] = _epilogue(found["epilogue"], arrays)
    elif kind == "sum_pool_bits":
        settings["threshold"] = Threshold(arrays["threshold"], arrays["flip"])
    else:
        settings |= {k: v for k, v in arrays.items() if k != "kernel"}
    return STAGES[kind](**settings)


def outline(found: dict[str, Any], spec: Spec) -> tuple[Spec, int]:
    """What a stage gives, and the bytes it takes in memory, before it takes them.

    Args:
      found: As `complete` gives them.
      spec: What the stage gets.

    Raises:
      ValueError: If it cannot follow what comes before, or is larger than allowed.
    """
    parts = members(found, spec)
    if "kernel" in parts:
        checks.limit(
            "the weights of a kernel to number",
            prod(parts["kernel"].shape),
            checks.LARGEST_KERNEL,
        )
    if pads := found.get("padding"):
        sizes = zip(spec.shape, pads, strict=False)
        padded = prod(size + sum(pair) for size, pair in sizes) * spec.shape[-1]
        checks.limit("a padded image", padded, checks.LARGEST_IMAGE)
    arrays = {
        name: jax.ShapeDtypeStruct(part.shape, np.float32)
        for name, part in parts.items()
    }
    stage = jax.eval_shape(partial(build, found), arrays)
    out = stage.out(spec)
    checks.limit("what an image becomes", prod(out.shape), checks.LARGEST_IMAGE)
    memory = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stage))
    if found["kind"] in ("binary", "scaled"):
        checks.limit("a packed kernel", memory, checks.LARGEST_PACKED)
    return out, memory


def stored_bytes(stage: Stage, spec: Spec) -> int:
    """How many bytes the stage's arrays take in a file."""
    parts = members(complete(attributes(stage)), spec)
    return sum(part.nbytes for part in parts.values())


def _epilogue(name: str, arrays: dict[str, Any]) -> Affine | Threshold:
    if name == "threshold":
        return Threshold(arrays["threshold"], arrays["flip"])
    bias = arrays["bias"]
    scale = arrays.get("scale", jnp.ones_like(bias))
    return Affine(scale, bias, relu=name == "affine_relu")


def _defaults(window: Any) -> dict[str, Any]:
    rank = len(window)
    return {
        "parameters": 0,
        "strides": [1] * rank,
        "padding": [[0, 0]] * rank,
        "dilation": [1] * rank,
        "groups": 1,
        "name": "",
    }


def _pads(value: Any, rank: int) -> Pads:
    if not isinstance(value, list) or len(value) != rank:
        raise ValueError(f"expected {rank} pairs, got {checks.clip(value)}")
    pairs = [checks.integers(pair, length=2) for pair in value]
    return tuple((before, after) for before, after in pairs)
