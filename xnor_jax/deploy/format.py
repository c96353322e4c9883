"""Packed networks in a file: safetensors, one JSON description in its metadata.

A file holds numbers and words, no code. It is read in two steps: the description first,
checked field by field and followed stage by stage, until it is known which arrays of
which size the file must have; then these, and no others. The limits on sizes are in
`xnor_jax.deploy.checks`.
"""

import json
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from xnor_jax.deploy import checks, encoding
from xnor_jax.deploy.packed import Info, PackedModel, Preprocessing
from xnor_jax.deploy.report import report
from xnor_jax.deploy.stage import Spec
from xnor_jax.deploy.stages import STAGES

FORMAT = "xnor_jax packed network"
VERSION = 1
_KEY = "xnor_jax"
_LAYOUT = "bit 1 is -1; least significant bit first; C order of [*window, in, out]"
_DTYPES = {"F32": "<f4", "I32": "<i4", "I16": "<i2", "U8": "u1"}


class FormatError(ValueError):
    """A file that is no packed network, is damaged, or is too new."""


class _Description(NamedTuple):
    """What a file's metadata say."""

    image_shape: tuple[int, ...]
    stages: list[dict[str, Any]]  # complete attributes
    specs: list[Spec]  # what each stage gets
    info: Info


def save(
    path: str | os.PathLike[str],
    packed: PackedModel,
    *,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] = (),
    test_accuracy: float | None = None,
    name: str | None = None,
    dataset: str | None = None,
) -> None:
    """Write a packed network to a file; what stood there stays until it is complete.

    What is not given here is taken from `packed.info`. The same network gives the same
    bytes.

    Args:
      path: The file, such as `lenet5.safetensors`.
      packed: From `pack` or `load`.
      preprocessing: How pixels become its input.
      class_names: One per logit.
      test_accuracy: A fraction of 1.
      name: Of the network or its recipe.
      dataset: What it was trained on, by its name in `xnor_jax.data`.

    Raises:
      ValueError: If the network has its own `__call__`, which no file can hold, or what
        is said of it does not fit it.
      OSError: If the file cannot be written.
    """
    info = Info(
        name if name is not None else packed.info.name,
        preprocessing or packed.info.preprocessing,
        tuple(class_names) or packed.info.class_names,
        test_accuracy if test_accuracy is not None else packed.info.test_accuracy,
        dataset if dataset is not None else packed.info.dataset,
    )
    try:
        data = to_bytes(packed, info)
    except ValueError as error:
        raise ValueError(f"save: {error}") from error
    _write(Path(path), data)


def load(path: str | os.PathLike[str], *, backend: str = "auto") -> PackedModel:
    """Read a packed network from a file.

    Args:
      path: A file that `save` wrote.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Returns:
      The network; what the file says of it is in its `info`.

    Raises:
      FormatError: If the file is damaged, no packed network, or of a newer version.
      OSError: If it cannot be read.
      ValueError: If there is no such backend.
      RuntimeError: If the backend is not available.
    """
    path = Path(path)
    # Before it is opened: a pipe would wait for a writer.
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: expected a regular file")
    if found.st_size > checks.LARGEST_FILE:
        raise FormatError(
            f"{path}: expected at most {checks.LARGEST_FILE} bytes, got {found.st_size}"
        )
    with path.open("rb") as file:
        data = file.read(checks.LARGEST_FILE)
    try:
        packed = from_bytes(data)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    return packed.with_backend(backend)


def to_bytes(packed: PackedModel, info: Info) -> bytes:
    """A packed network as the bytes of a file.

    Raises:
      ValueError: If it has its own `__call__`, or what is said of it does not fit it.
    """
    for stage in packed.stages:
        if stage.kind not in STAGES:
            raise ValueError(
                f"expected a network that lists its layers, got {stage.name} with a "
                "__call__ of its own, which a file cannot hold; write it as an "
                "xnor_jax.nn.Layered"
            )
    found = {
        "format": FORMAT,
        "version": VERSION,
        "layout": _LAYOUT,
        "image_shape": list(packed.image_shape),
        "stages": [encoding.attributes(stage) for stage in packed.stages],
        **_info_to_json(info),
    }
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    description = _describe(json.loads(text))
    tensors: dict[str, np.ndarray] = {}
    for index, stage in enumerate(packed.stages):
        spec = description.specs[index]
        parts = encoding.members(description.stages[index], spec)
        values = encoding.numbers(stage, spec)
        for part, member in parts.items():
            tensors[f"{index}.{part}"] = member.store(values[part])
    data = safetensors.numpy.save(tensors, {_KEY: text})
    _header(data)
    return data


def from_bytes(data: bytes) -> PackedModel:
    """The packed network in the bytes of a file.

    Raises:
      ValueError: If they are none.
    """
    metadata = _strict_json(_header(data), "the header").get("__metadata__")
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ValueError("expected a packed network of xnor_jax, got another file")
    description = _describe(_strict_json(text, "the description"))
    try:
        stored = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"expected a complete safetensors file: {reason}") from None
    built, sizes = [], []
    for index, (found, spec) in enumerate(
        zip(description.stages, description.specs, strict=True)
    ):
        parts = encoding.members(found, spec)
        arrays = {
            part: _restore(
                stored.pop(f"{index}.{part}", None), f"{index}.{part}", member
            )
            for part, member in parts.items()
        }
        built.append(encoding.build(found, arrays))
        sizes.append(sum(member.nbytes for member in parts.values()))
    if stored:
        raise ValueError(f"unknown array {checks.clip(sorted(stored)[0])}")
    return PackedModel(
        stages=tuple(built),
        image_shape=description.image_shape,
        report=report(built, description.image_shape, sizes),
        info=description.info,
    )


def _header(data: bytes) -> bytes:
    """The JSON at the start of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(len(data) - 8, checks.LARGEST_HEADER):
        raise ValueError(
            f"expected a safetensors file with a header of at most "
            f"{checks.LARGEST_HEADER} bytes"
        )
    return data[8 : 8 + size]


def _strict_json(text: str | bytes, what: str) -> dict[str, Any]:
    def refuse(name):
        raise ValueError(f"{name} is no number")

    try:
        return checks.mapping(json.loads(text, parse_constant=refuse))
    except (ValueError, RecursionError):
        raise ValueError(f"expected {what} to be a JSON object") from None


def _describe(found: dict[str, Any]) -> _Description:
    """Check a description, and follow the shapes through its stages."""
    if found.get("format") != FORMAT:
        raise ValueError("expected a packed network of xnor_jax, got another format")
    version = checks.integer(found.get("version"), least=1)
    if version > VERSION:
        raise ValueError(
            f"the file is of version {version}, this library reads up to {VERSION}; "
            "update xnor_jax"
        )
    wanted = {
        "format": checks.string,
        "version": checks.integer,
        "layout": lambda value: checks.one_of(value, choices=(_LAYOUT,)),
        "image_shape": lambda value: checks.integers(value, least=1),
        "stages": _stages,
        **_INFO,
    }
    found = checks.fields(_INFO_DEFAULTS | found, wanted)
    shape = found["image_shape"]
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"image_shape: expected 1 to 4 sizes, got {len(shape)}")
    checks.limit("the numbers of an image", prod(shape), checks.LARGEST_IMAGE)
    spec, specs, memory = Spec(shape), [], 0
    for index, stage in enumerate(found["stages"]):
        specs.append(spec)
        try:
            spec, more = encoding.outline(stage, spec)
        except ValueError as error:
            raise ValueError(f"stage {index} ({stage['name']}): {error}") from None
        memory += more
        checks.limit("the bytes of a network in memory", memory, checks.LARGEST_NETWORK)
    if spec.bits:
        raise ValueError("expected a network that ends in floats, got bits")
    info = _info_from_json(found, shape, classes=spec.shape[-1])
    return _Description(shape, found["stages"], specs, info)


def _stages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not 1 <= len(value) <= checks.MOST_STAGES:
        raise ValueError(f"expected a list of 1 to {checks.MOST_STAGES} stages")
    result = []
    for index, stage in enumerate(value):
        try:
            result.append(encoding.complete(stage))
        except ValueError as error:
            raise ValueError(f"stage {index}: {error}") from None
    return result


def _restore(found: Any, name: str, member: encoding.Member) -> np.ndarray:
    if found is None:
        raise ValueError(f"expected an array {name}")
    wanted = member.stored
    dtype = _DTYPES.get(found["dtype"])
    if (
        dtype is None
        or np.dtype(dtype) != wanted.dtype
        or tuple(found["shape"]) != wanted.shape
    ):
        raise ValueError(
            f"{name}: expected {np.dtype(wanted.dtype)} of shape {wanted.shape}, got "
            f"{found['dtype']} of shape {tuple(found['shape'])}"
        )
    try:
        return member.restore(np.frombuffer(found["data"], dtype).reshape(wanted.shape))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _info_to_json(info: Info) -> dict[str, Any]:
    found: dict[str, Any] = {"name": info.name, "class_names": list(info.class_names)}
    if info.preprocessing is not None:
        pixels = info.preprocessing
        lists = {"mean": pixels.mean, "std": pixels.std}
        resize = {} if pixels.resize is None else {"resize": pixels.resize}
        found["preprocessing"] = {
            **{k: list(map(float, v)) for k, v in lists.items()},
            **resize,
        }
    if info.dataset is not None:
        found["dataset"] = info.dataset
    if info.test_accuracy is not None:
        found["test_accuracy"] = float(info.test_accuracy)
    return {k: v for k, v in found.items() if v != _INFO_DEFAULTS[k]}


def _info_from_json(
    found: dict[str, Any], shape: tuple[int, ...], *, classes: int
) -> Info:
    names = found["class_names"]
    if names and len(names) != classes:
        raise ValueError(f"class_names: expected {classes}, got {len(names)}")
    pixels = found["preprocessing"]
    if pixels is not None:
        for name in ("mean", "std"):
            if len(pixels[name]) != shape[-1]:
                raise ValueError(
                    f"preprocessing: expected {shape[-1]} numbers in {name}, one per "
                    f"channel, got {len(pixels[name])}"
                )
        resize = pixels["resize"]
        square = len(shape) == 3 and shape[0] == shape[1]
        if resize is not None and not (square and resize >= shape[0]):
            raise ValueError(
                f"preprocessing: expected square images of at most {resize} pixels a "
                f"side where pictures are resized, got {list(shape)}"
            )
        pixels = Preprocessing(**pixels)
    return Info(found["name"], pixels, names, found["test_accuracy"], found["dataset"])


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > checks.MOST_CLASSES:
        raise ValueError(f"expected a list of at most {checks.MOST_CLASSES} names")
    return tuple(map(checks.string, value))


def _per_channel(value: Any, *, least: float) -> tuple[float, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 4096:
        raise ValueError("expected a list of numbers, one per channel")
    return tuple(checks.real(number, least=least, largest=1e6) for number in value)


_PREPROCESSING = {
    "mean": partial(_per_channel, least=-1e6),
    "std": partial(_per_channel, least=1e-6),
    "resize": lambda value: (
        None if value is None else checks.integer(value, least=1, largest=2**16)
    ),
}
_INFO: dict[str, Callable[[Any], Any]] = {
    "name": lambda value: value if value is None else checks.string(value),
    "dataset": lambda value: value if value is None else checks.string(value),
    "preprocessing": lambda value: (
        None
        if value is None
        else checks.fields({"resize": None} | checks.mapping(value), _PREPROCESSING)
    ),
    "class_names": _strings,
    "test_accuracy": lambda value: (
        None if value is None else checks.real(value, least=0, largest=1)
    ),
}
_INFO_DEFAULTS: dict[str, Any] = {
    "name": None,
    "dataset": None,
    "preprocessing": None,
    "class_names": [],
    "test_accuracy": None,
}


def _write(path: Path, data: bytes) -> None:
    # In the same folder: only there is the last step atomic.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
