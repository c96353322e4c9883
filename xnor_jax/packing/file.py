"""File format of packed networks: safetensors with a JSON description as metadata.

A file holds data and no code. All numbers are little-endian:

| bytes | contents |
|---|---|
| 0 to 7 | H, the size of the header, uint64, at most 2²⁰ |
| 8 to 7 + H | the header, a JSON object in UTF-8, space-padded to a multiple of 8 |
| from 8 + H | the data section: the arrays in sequence, without gaps |

The header's entry `__metadata__` is an object of two strings:

* `xnor_jax`: the description, also a JSON object, with the entries `format`, `version`,
  `layout`, `image_shape` and `nodes`, and if known `name`, `preprocessing`,
  `class_names`, `test_accuracy` and `dataset`. Each node has its `kind` and the
  settings of `xnor_jax.packing.graph` that differ from the default.
* `crc32`: the CRC-32 of zlib, PNG and zip (polynomial 0xEDB88320, reflected, all ones
  before and after) over the UTF-8 bytes of the description's text and then the data
  section, as 8 lower-case hexadecimal digits.

Every other entry is an array. Its key is `NODE.MEMBER`, the node's index and the
member's name; its value is `{"dtype", "shape", "data_offsets": [begin, end]}`, with
offsets in bytes from the start of the data section. A node's members and their `dtype`
and `shape` follow from the description:

| kind of member | dtype | shape |
|---|---|---|
| floats, reals | `F32` | the member's |
| integers | `I16` if their bound is at most 32767, else `I32` | the member's |
| indices | `I32` | the member's |
| kernel, flip | `U8` | `[ceil(signs / 8)]` |

Signs are stored without the padding that the kernels in memory have: bit 1 for −1,
least significant bit first, in C order (`[*window, C_in / groups, C_out]` for a
kernel), with unused bits of the last byte 0. An integer threshold of −bound stands for
−2³¹, a channel whose sign is constant. A loaded network computes exactly what the saved
one did.

Before it allocates memory for the arrays, a reader checks the header, the version and
the checksum; then the description, field by field, from which it computes the shapes of
all values and the size of every array; then that the file has exactly these arrays. The
limits on sizes are in `xnor_jax.packing.checks`.
"""

import json
import os
import stat
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from xnor_jax import ops
from xnor_jax.ops.kernel import kernel_from_bytes, kernel_to_bytes
from xnor_jax.packing import checks
from xnor_jax.packing.graph import NODES, Member, Node, Spec, input_specs
from xnor_jax.packing.network import Info, PackedModel, Preprocessing

FORMAT = "xnor_jax packed network"
VERSION = 3
_DESCRIPTION_KEY = "xnor_jax"
_CHECKSUM_KEY = "crc32"
_LAYOUT = "bit 1 is -1; least significant bit first; C order of [*window, in, out]"
_DTYPES = {"<f4": "F32", "<i4": "I32", "<i2": "I16", "|u1": "U8"}
_SIGNS = ("kernel", "flip")
_INT32_MIN = np.iinfo(np.int32).min


class FormatError(ValueError):
    """A file that is not a packed network, is damaged, or has another version."""


class _Description(NamedTuple):
    """The parsed contents of a file's description."""

    image_shape: tuple[int, ...]
    nodes: list[Node]  # without arrays
    members: list[dict[str, Member]]
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
    """Write a packed network to a file, replacing an older file atomically.

    Of a symbolic link, the file that it points to is replaced. Arguments that are left
    out are taken from `packed.info`. The same network always gives the same bytes.

    Args:
      path: The file, such as `lenet5.safetensors`.
      packed: From `pack` or `load`.
      preprocessing: Normalization of the pixels.
      class_names: One per logit.
      test_accuracy: Test accuracy, from 0 to 1.
      name: Name of the network or of its recipe.
      dataset: Name of the training data set in `xnor_jax.data`.

    Raises:
      ValueError: If an argument does not fit the network, or the network is too large.
      OSError: If the file cannot be written, or is a pipe or a device.
      TypeError: If `packed` is not a packed network.
    """
    if not isinstance(packed, PackedModel):
        raise TypeError(f"save: expected a network from pack, got {packed!r:.100}")
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
    _write(replaceable(path), data)


def load(path: str | os.PathLike[str], *, backend: str = "auto") -> PackedModel:
    """Read a packed network from a file.

    Args:
      path: A file that `save` wrote.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Returns:
      The network, with the file's metadata as `info`.

    Raises:
      FormatError: If the file is damaged, not a packed network, or of another version.
      OSError: If the file cannot be read.
      ValueError: If there is no such backend.
      RuntimeError: If the backend is not available.
    """
    path = Path(path)
    # Checked before opening: opening a pipe waits for a writer.
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: expected a regular file")
    if found.st_size > checks.LARGEST_FILE:
        raise FormatError(
            f"{path}: expected at most {checks.LARGEST_FILE} bytes, got {found.st_size}"
        )
    with path.open("rb") as file:
        data = file.read(found.st_size)
    try:
        packed = from_bytes(data)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error
    return packed.with_backend(backend)


def to_bytes(packed: PackedModel, info: Info) -> bytes:
    """Serialize a packed network to the bytes of a file.

    Raises:
      ValueError: If `info` does not fit the network, or the network is too large.
    """
    found = {
        "format": FORMAT,
        "version": VERSION,
        "layout": _LAYOUT,
        "image_shape": list(packed.image_shape),
        "nodes": [node.to_json() for node in packed.nodes],
        **_info_to_json(info),
    }
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    description = _describe(json.loads(text))
    tensors = {
        f"{index}.{name}": _store(packed.nodes[index].arrays[name], member)
        for index, members in enumerate(description.members)
        for name, member in members.items()
    }
    bare = safetensors.numpy.save(tensors)
    start = _data_start(bare)
    # safetensors writes metadata entries in an order that varies between calls.
    checksum = _checksum(text, memoryview(bare)[start:])
    metadata = {_DESCRIPTION_KEY: text, _CHECKSUM_KEY: checksum}
    entries = {"__metadata__": metadata} | json.loads(bare[8:start])
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    checks.limit("bytes in the header", len(header), checks.LARGEST_HEADER)
    return b"".join((len(header).to_bytes(8, "little"), header, bare[start:]))


def from_bytes(data: bytes) -> PackedModel:
    """Parse a packed network from the bytes of a file.

    Raises:
      ValueError: If the bytes are not a valid packed network.
    """
    start = _data_start(data)
    entries = _strict_json(data[8:start], "the header")
    metadata = entries.pop("__metadata__", None)
    metadata = metadata if isinstance(metadata, dict) else {}
    text = metadata.pop(_DESCRIPTION_KEY, None)
    if not isinstance(text, str):
        raise ValueError("expected a packed network of xnor_jax, got another file")
    found = _strict_json(text, "the description")
    _check_version(found)
    section = memoryview(data)[start:]
    _check_entries(entries, len(section))
    if metadata != {_CHECKSUM_KEY: _checksum(text, section)}:
        raise ValueError(
            "the file is damaged: its checksum does not match; copy or pack it again"
        )
    description = _describe(found)
    wanted = {
        f"{index}.{name}": member
        for index, members in enumerate(description.members)
        for name, member in members.items()
    }
    # Check all arrays before unpacking any.
    for name, member in wanted.items():
        _check_stored(entries.get(name), name, member)
    if unknown := sorted(entries.keys() - wanted.keys()):
        raise ValueError(f"unknown array {checks.clip(unknown[0])}")
    arrays: list[dict[str, Any]] = [{} for _ in description.nodes]
    for name, member in wanted.items():
        index, _, part = name.partition(".")
        begin, end = entries[name]["data_offsets"]
        try:
            arrays[int(index)][part] = _restore(section[begin:end], member)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    nodes = tuple(
        replace(node, arrays=own)
        for node, own in zip(description.nodes, arrays, strict=True)
    )
    return PackedModel(
        nodes=nodes,
        image_shape=description.image_shape,
        info=description.info,
    )


def _from_json(found: Any) -> Node:
    """Make a node without its arrays."""
    kind = checks.mapping(found).get("kind")
    if not isinstance(kind, str) or kind not in NODES:
        raise ValueError(f"unknown kind of node {checks.clip(kind)}")
    return NODES[kind](**NODES[kind].checked(found))


def _memory(member: Member) -> int:
    """Bytes in memory, where a kernel's channels are padded to multiples of 32.

    The engine keeps a kernel of floats and a copy in which each group is padded.
    """
    plain = 4 * prod(member.shape)
    if not member.groups:
        return plain
    *window, c_in, c_out = member.shape
    each = c_out // member.groups
    padded = 4 * member.groups * prod(window) * -(-each // 32) * 32
    if member.kind == "kernel":
        return padded * -(-c_in // 32)
    return plain + padded * c_in


def _store(array: Any, member: Member) -> np.ndarray:
    if member.kind == "kernel":
        found = (*array.window, array.in_features, array.out_features)
        if (found, array.groups) != (member.shape, member.groups):
            raise ValueError(
                f"expected a kernel of shape {member.shape} and {member.groups} groups,"
                f" got {found} and {array.groups}"
            )
        return kernel_to_bytes(array)
    if member.kind == "flip":
        signs = np.asarray(ops.unpack_bits(array, member.shape[-1]))
        return np.packbits(signs < 0, bitorder="little")
    numbers = np.asarray(array)
    if numbers.shape != member.shape:
        raise ValueError(f"expected an array {member.shape}, got {numbers.shape}")
    if member.kind == "integers":
        # At or below the smallest sum all thresholds are equivalent: a constant sign.
        numbers = np.maximum(numbers, -member.bound)
    # `ascontiguousarray` gives a scalar an axis, so the shape is restored.
    shape, dtype = member.stored
    stored = np.ascontiguousarray(numbers, dtype).reshape(shape)
    _check_numbers(stored, member)
    return stored


def _check_numbers(stored: np.ndarray, member: Member) -> None:
    if member.kind == "integers":
        if (np.abs(stored.astype(np.int64)) > member.bound).any():
            raise ValueError(f"expected thresholds of at most {member.bound}")
    elif member.kind == "indices":
        if ((stored < 0) | (stored >= member.bound)).any():
            raise ValueError(f"expected indices from 0 to {member.bound - 1}")
    else:
        finite = np.isfinite(stored)
        if member.kind == "reals":
            finite |= np.isinf(stored)
        if not finite.all():
            raise ValueError("expected finite numbers")


def _restore(data: Any, member: Member) -> Any:
    shape, dtype = member.stored
    stored = np.frombuffer(data, dtype).reshape(shape)
    if member.kind not in _SIGNS:
        _check_numbers(stored, member)
        if member.kind == "integers":
            stored = stored.astype(np.int32)
            stored = np.where(stored == -member.bound, _INT32_MIN, stored)
        return jnp.asarray(stored)
    # Only the last byte: unpacking all of a kernel's bits takes eight times its bytes.
    spare = -prod(member.shape) % 8
    if spare and int(stored[-1]) >> (8 - spare):
        raise ValueError("expected 0 in the unused bits")
    if member.kind == "flip":
        bits = np.unpackbits(stored, count=member.shape[-1], bitorder="little")
        return ops.pack_bits(np.where(bits, np.float32(-1), np.float32(1)))
    return kernel_from_bytes(stored, member.shape, member.groups)


def _check_stored(found: Any, name: str, member: Member) -> None:
    if found is None:
        raise ValueError(f"expected an array {name}")
    shape, dtype = member.stored
    if found["dtype"] != _DTYPES[dtype.str] or found["shape"] != shape:
        raise ValueError(
            f"{name}: expected {dtype} of shape {shape}, got {found['dtype']} of shape "
            f"{found['shape']}"
        )
    begin, end = found["data_offsets"]
    if end - begin != member.stored_bytes:
        raise ValueError(f"{name}: expected {member.stored_bytes} bytes")


def _check_entries(entries: dict[str, Any], size: int) -> None:
    """Check that the arrays fill a section of this size without gaps or overlaps."""
    offsets = []
    for name, entry in entries.items():
        wanted = {
            "dtype": checks.string,
            "shape": partial(checks.integers, largest=checks.LARGEST_FILE),
            "data_offsets": partial(
                checks.integers, largest=checks.LARGEST_FILE, length=2
            ),
        }
        try:
            entry |= checks.fields(entry, wanted)
        except ValueError as error:
            raise ValueError(f"{checks.clip(name)}: {error}") from None
        offsets.append(entry["data_offsets"])
    at = 0
    for begin, end in sorted(offsets):
        if begin != at or end < begin:
            raise ValueError("expected arrays without gaps in the data section")
        at = end
    if at != size:
        raise ValueError(
            f"expected a complete file: {at} bytes of arrays, got {size}; copy or pack "
            "it again"
        )


def _checksum(text: str, section: memoryview) -> str:
    # A lone surrogate has no UTF-8 encoding; it counts as a question mark.
    return f"{zlib.crc32(section, zlib.crc32(text.encode(errors='replace'))):08x}"


def _data_start(data: bytes) -> int:
    """The offset of the data section in a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= size <= min(len(data) - 8, checks.LARGEST_HEADER):
        raise ValueError(
            f"expected a safetensors file with a header of at most "
            f"{checks.LARGEST_HEADER} bytes"
        )
    return 8 + size


def _strict_json(text: str | bytes, what: str) -> dict[str, Any]:
    def refuse(name):
        raise ValueError(f"{name} is not a JSON number")

    def unique(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("duplicate keys")
        return found

    try:
        # `json.loads` would guess the encoding of bytes.
        text = text if isinstance(text, str) else str(text, "utf-8")
        found = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected {what} to be a JSON object: {error}") from None
    if not isinstance(found, dict):
        got = checks.clip(found)
        raise ValueError(f"expected {what} to be a JSON object, got {got}")
    return found


def _check_version(found: dict[str, Any]) -> None:
    if found.get("format") != FORMAT:
        raise ValueError("expected a packed network of xnor_jax, got another format")
    version = checks.integer(found.get("version"), least=1)
    if version > VERSION:
        raise ValueError(
            f"the file is of version {version}, this library reads version {VERSION}; "
            "update xnor_jax"
        )
    if version < VERSION:
        raise ValueError(
            f"the file is of version {version}, which this library no longer reads; "
            "pack the network again"
        )


def _describe(found: dict[str, Any]) -> _Description:
    """Check a description, and compute the shapes of all values and arrays."""
    wanted = {
        "format": checks.string,
        "version": checks.integer,
        "layout": lambda value: checks.one_of(value, choices=(_LAYOUT,)),
        "image_shape": lambda value: checks.integers(value, least=1),
        "nodes": lambda value: checks.sequence(value, checks.MOST_NODES, least=1),
        **_INFO,
    }
    found = checks.fields(_INFO_DEFAULTS | found, wanted)
    shape = found["image_shape"]
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"image_shape: expected 1 to 4 sizes, got {len(shape)}")
    _check_size(shape)
    nodes: list[Node] = []
    members: list[dict[str, Member]] = []
    specs, memory, stored = [Spec(shape)], 0, 0
    for index, json_node in enumerate(found["nodes"]):
        try:
            node = _from_json(json_node)
            inputs = input_specs(node, specs)
            spec, own = node.out(inputs), node.members(inputs)
            _check_size(spec.shape)
        except ValueError as error:
            raise ValueError(f"node {index}: {error}") from None
        memory += sum(map(_memory, own.values()))
        stored += sum(m.stored_bytes for m in own.values())
        # With the file's own bytes the total is three times those, plus a constant.
        most = min(2 * stored + checks.LARGEST_PACKED, checks.LARGEST_NETWORK)
        checks.limit("bytes of arrays in memory", memory, most)
        specs.append(spec)
        nodes.append(node)
        members.append(own)
    if specs[-1].dtype != "float32" or not specs[-1].shape:
        raise ValueError(
            f"expected a network that ends in floats, got {specs[-1].dtype} of shape "
            f"{specs[-1].shape}"
        )
    info = _info_from_json(found, shape, classes=specs[-1].shape[-1])
    return _Description(shape, nodes, members, info)


def _check_size(shape: tuple[int, ...]) -> None:
    if len(shape) > checks.MOST_AXES:
        raise ValueError(f"expected at most {checks.MOST_AXES} axes, got {len(shape)}")
    checks.limit("numbers in an image", prod(shape), checks.LARGEST_IMAGE)


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


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(checks.string, checks.sequence(value, checks.MOST_CLASSES)))


def _per_channel(value: Any, *, least: float) -> tuple[float, ...]:
    numbers = checks.sequence(value, 4096, least=1)
    return tuple(checks.real(number, least=least, largest=1e6) for number in numbers)


_PREPROCESSING = {
    "mean": partial(_per_channel, least=-1e6),
    "std": partial(_per_channel, least=1e-6),
    "resize": _optional(partial(checks.integer, least=1, largest=2**16)),
}
_INFO: dict[str, Callable[[Any], Any]] = {
    "name": _optional(checks.string),
    "dataset": _optional(checks.string),
    "preprocessing": _optional(
        lambda value: checks.fields(
            {"resize": None} | checks.mapping(value), _PREPROCESSING
        )
    ),
    "class_names": lambda value: () if value is None else _strings(value),
    "test_accuracy": _optional(partial(checks.real, least=0, largest=1)),
}
_INFO_DEFAULTS: dict[str, Any] = {
    "name": None,
    "dataset": None,
    "preprocessing": None,
    "class_names": [],
    "test_accuracy": None,
}


def replaceable(path: str | os.PathLike[str]) -> Path:
    """The file that writing to a path replaces: that at the end of symbolic links.

    Raises:
      FileExistsError: If it is no regular file, such as a pipe or a device.
      FileNotFoundError: If its folder does not exist.
    """
    end = Path(os.path.realpath(path))
    if not end.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist")
    if end.exists() and not end.is_file():
        raise FileExistsError(f"{path} exists and is not a regular file")
    return end


def _write(path: Path, data: bytes) -> None:
    # In the same folder: a rename across file systems is not atomic. A longer name than
    # the file's own could be too long for the file system.
    name = f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.tmp"
    temporary = path.with_name(name)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
