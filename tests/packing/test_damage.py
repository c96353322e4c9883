"""Damaged files give a one-line error or a valid network, in little time and memory."""

import copy
import json
import random
import time
import zlib
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax import ops
from xnor_jax.packing import file, graph
from xnor_jax.packing.functions import FUNCTIONS
from xnor_jax.packing.network import Info, PackedModel, Preprocessing

DTYPES = {"F32": 4, "I32": 4, "I16": 2, "U8": 1, "F64": 8, "BF16": 2, "BOOL": 1}
UNIT = {"strides": (1, 1), "padding": ((1, 1),) * 2, "dilation": (1, 1)}


def every_kind():
    """A network with every kind of node and random arrays, and its metadata."""
    pool = {"window": (2, 2), "strides": (1, 1), "padding": ((0, 1),) * 2}
    kinds = [
        graph.Conv(inputs=(0,), window=(3, 3), features=12, **UNIT, epilogue="affine"),
        graph.Norm(inputs=(1,)),
        graph.Sign(inputs=(2,)),
        graph.BinaryConv(
            **{"inputs": (3,), "window": (3, 3), "features": 16, **UNIT},
            groups=2,
            epilogue="threshold",
        ),
        graph.MaxPoolBits(inputs=(4,), **pool),
        graph.BinaryConv(inputs=(5,), window=(1, 1), features=8, **UNIT, name="layer"),
        graph.SumPoolBits(inputs=(6,), **pool),
        graph.Pool(inputs=(6,), **pool, function="sum"),
        graph.Concatenate(inputs=(7, 8), axis=3),
        graph.Slice(inputs=(9,), start=(0, 1, 2), stop=(4, 5, 16), strides=(1, 2, 1)),
        graph.Pad(inputs=(10,), padding=((1, 0), (0, 0), (0, 0)), value=-np.inf),
        graph.Transpose(inputs=(11,), order=(2, 1, 3)),
        graph.Take(inputs=(12,), shape=(3, 6)),
        graph.Reshape(inputs=(13,), shape=(3, 6)),
        graph.Elementwise(
            inputs=(14,), function="mul", operands=(0, -1), shapes=((), (6,))
        ),
        graph.MatMul(inputs=(15, 16)),
        graph.Reduce(inputs=(17,), function="max", axes=(1,)),
        graph.Constant(inputs=(0,), shape=(1, 6)),
        graph.Broadcast(inputs=(19,), shape=(2, 6)),
        graph.Mean(inputs=(20,)),
        graph.Conv(inputs=(21,), features=3, epilogue="affine_relu"),
    ]
    # The second operand of the matrix product: the first one, transposed.
    kinds.insert(15, graph.Transpose(inputs=(15,), order=(2, 1)))
    rng = np.random.default_rng(0)
    specs, nodes = [graph.Spec((6, 5, 2))], []
    for node in kinds:
        inputs = [specs[i] for i in node.inputs]
        members = node.members(inputs)
        arrays = {name: draw_array(rng, member) for name, member in members.items()}
        nodes.append(replace(node, arrays=arrays))
        specs.append(node.out(inputs))
    assert {node.kind for node in nodes} == set(graph.NODES)
    packed = PackedModel(nodes=tuple(nodes), image_shape=(6, 5, 2))
    names = ("zero", "eins", "« two »")
    info = Info("net", Preprocessing((0.1, 0.5), (0.3, 1e-3)), names, 0.5, "mnist")
    return packed, info


def draw_array(rng, member):
    if member.kind == "kernel":
        return ops.pack_kernel(
            jnp.float32(rng.normal(size=member.shape)), member.groups
        )
    if member.kind == "flip":
        return ops.pack_bits(jnp.float32(rng.normal(size=member.shape)))
    if member.kind in ("integers", "indices"):
        return jnp.int32(rng.integers(0, member.bound, member.shape))
    return jnp.float32(rng.normal(size=member.shape))


@pytest.fixture(scope="module")
def parts():
    """The parts of a file: description, header entries and data section."""
    data = file.to_bytes(*every_kind())
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    text = entries.pop("__metadata__")["xnor_jax"]
    return json.loads(text), entries, data[start:]


def to_file_bytes(description, entries, section, rng):
    """The bytes of a file, nearly always with a correct checksum."""
    text = description if isinstance(description, str) else json.dumps(description)
    checksum = f"{zlib.crc32(text.encode(errors='replace') + section):08x}"
    if rng.random() < 0.02:
        checksum = rng.choice(
            ["", "00000000", checksum.upper() + "0", 7, None, [checksum]]
        )
    header = {"__metadata__": {"xnor_jax": text, "crc32": checksum}, **entries}
    encoded = json.dumps(header).encode()
    size = len(encoded)
    if rng.random() < 0.01:
        size = rng.choice([0, size - 1, size + 1, 2**20, 2**32, 2**63, 2**64 - 1])
    return size.to_bytes(8, "little") + encoded + section


@pytest.mark.slow
def test_every_node_kind_survives_save_and_load():
    packed, info = every_kind()
    loaded = file.from_bytes(file.to_bytes(packed, info))
    assert loaded.info == info and loaded.report == packed.report
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(loaded), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    x = jnp.float32(np.random.default_rng(1).normal(size=(2, 6, 5, 2)))
    with jax.disable_jit():
        np.testing.assert_array_equal(
            loaded.with_backend("xla")(x), packed.with_backend("xla")(x)
        )


# Mutations: each changes the parts in place, or returns a new description or section.


def other_value(rng, value):
    """A random value of any JSON type, close to the old one or not."""
    choices = [None, True, -1, 0, 1, 1.5, 2**24, 2**31, 2**63, 10**40, "", "x", [], {}]
    choices += [[[]], -1e300, 1e-300, "\ud800", "x" * 201, [value], [value, value]]
    if type(value) is int:
        choices += 3 * [value + 1, value - 1, 2 * value, 64 * value, str(value)]
    if isinstance(value, list):
        choices += 3 * [value[1:], value[:1], value + value[:1], value[::-1]]
        choices += [value * 1000]
    if isinstance(value, str):
        kinds = [*graph.NODES, *graph.EPILOGUES, *FUNCTIONS]
        choices += [value + "\0", value + "\x1b[2J", *rng.sample(kinds, 8)]
    return rng.choice(choices)


def entry_paths(value, path=()):
    """The path of every entry inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from entry_paths(inner, (*path, key))


def value_at(value, path):
    for key in path:
        value = value[key]
    return value


def change_entry(rng, tree):
    *path, last = rng.choice(list(entry_paths(tree)))
    parent = value_at(tree, path)
    if rng.random() < 0.15:
        del parent[last]
    elif rng.random() < 0.1 and isinstance(parent, dict):
        parent[rng.choice(["kind", "epilogue", "groups", "x" * 300, "axis"])] = 1
    else:
        parent[last] = other_value(rng, parent[last])


def change_description(rng, description, entries, section):
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        change_entry(rng, description)


def change_node(rng, description, entries, section):
    nodes = description["nodes"]
    index = rng.randrange(len(nodes))
    match rng.randrange(6):
        case 0:
            del nodes[index]
        case 1:
            nodes.insert(index, copy.deepcopy(rng.choice(nodes)))
        case 2:
            other = rng.randrange(len(nodes))
            nodes[index], nodes[other] = nodes[other], nodes[index]
        case 3:
            inputs = [rng.randrange(len(nodes) + 2) for _ in range(rng.randrange(10))]
            nodes[index]["inputs"] = inputs
        case 4:
            nodes[index]["kind"] = rng.choice([*graph.NODES])
        case 5:
            description["nodes"] = (nodes * 400)[: rng.choice([4096, 4097, 1000])]


def change_size(rng, description, entries, section):
    """Sizes that would take much memory or time if they were not checked."""
    huge = rng.choice([2**10, 2**14, 2**20, 2**24])
    if rng.random() < 0.3:
        shape = [huge] * rng.randrange(1, 6)
        description["image_shape"] = shape
        return
    node = rng.choice(description["nodes"])
    name = rng.choice(["features", "window", "strides", "padding", "dilation", "shape"])
    value = {"features": huge, "padding": [[huge, huge]] * 2}.get(name, [huge, huge])
    node[name] = value
    if rng.random() < 0.5:
        node["groups"] = rng.choice([huge, node.get("features", 1)])


def change_header(rng, description, entries, section):
    for _ in range(rng.choice([1, 1, 2])):
        change_entry(rng, entries)


def change_offsets(rng, description, entries, section):
    one, other = rng.sample(list(entries), 2)
    a, b = entries[one]["data_offsets"], entries[other]["data_offsets"]
    match rng.randrange(4):
        case 0:
            entries[one]["data_offsets"], entries[other]["data_offsets"] = b, a
        case 1:
            a[rng.randrange(2)] += rng.choice([-4, -1, 1, 4, 2**32])
        case 2:
            entries[one]["data_offsets"] = list(b)
        case 3:
            entries[one], entries[other] = entries[other], entries[one]


def change_array(rng, description, entries, section):
    """Another number of values and dtype, with consistent header entries."""
    name = rng.choice(list(entries))
    begin, end = entries[name]["data_offsets"]
    dtype = rng.choice(list(DTYPES))
    count = rng.choice([0, 1, end - begin, 2 * (end - begin), 4096])
    size = count * DTYPES[dtype]
    entries[name] = {
        "dtype": dtype,
        "shape": [count],
        "data_offsets": [begin, begin + size],
    }
    for key, entry in entries.items():
        if key != name and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [
                o + size - end + begin for o in entry["data_offsets"]
            ]
    return section[:begin] + rng.randbytes(size) + section[end:]


def change_numbers(rng, description, entries, section):
    """Other values of the same size, such as NaN, infinity and extremes."""
    begin, end = rng.choice(list(entries.values()))["data_offsets"]
    patterns = [b"\0", b"\xff", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x80\x7f"]
    filled = (rng.choice(patterns) * (end - begin))[: end - begin]
    if rng.random() < 0.5:
        filled = rng.randbytes(end - begin)
    return section[:begin] + filled + section[end:]


def change_text(rng, description, entries, section):
    text = json.dumps(description)
    position = rng.randrange(len(text))
    depth = rng.choice([1, 100, 10**5])
    fragments = ["{", "}", '"', ",", "1e999", "NaN", "\\u0000", "[" * depth, "9" * 5000]
    return text[:position] + rng.choice(fragments) + text[position + rng.randrange(3) :]


CHANGES = (
    *(change_description, change_description, change_node, change_size),
    *(change_header, change_offsets, change_array, change_numbers, change_text),
)


def mutant(rng, parts):
    description, entries, section = parts
    description = json.loads(json.dumps(description))
    entries = json.loads(json.dumps(entries))
    change = rng.choice(CHANGES)
    if result := change(rng, description, entries, section):
        if isinstance(result, str):
            description = result
        else:
            section = result
    data = to_file_bytes(description, entries, section, rng)
    if rng.random() < 0.1:  # cut, extended or overwritten
        position = rng.randrange(len(data))
        data = rng.choice(
            [
                data[:position],
                data + rng.randbytes(rng.choice([1, 8, 1000])),
                data[:position]
                + rng.randbytes(rng.randrange(9))
                + data[position + 1 :],
            ]
        )
    return data


def peak_memory():
    """The process's peak memory since the last call and its current size, in bytes."""
    status = Path("/proc/self/status").read_text()
    peak, current = (
        int(status.partition(name)[2].split()[0]) * 1024
        for name in ("VmHWM:", "VmRSS:")
    )
    Path("/proc/self/clear_refs").write_text("5")
    return peak, current


def check_mutants(parts, count, seed):
    rng = random.Random(seed)
    measured = Path("/proc/self/clear_refs").exists()
    refused, loaded = set(), 0
    for number in range(count):
        data = mutant(rng, parts)
        before = peak_memory()[1] if measured else 0
        start = time.process_time()
        try:
            found = file.from_bytes(data)
            loaded += 1
        except ValueError as error:
            line = str(error)
            assert line.isprintable() and len(line) < 400, line
            refused.add(line.partition(":")[2][:20])
            found = None
        assert time.process_time() - start < 2, number
        if measured:
            assert peak_memory()[0] - before < 3 * len(data) + 2**26, number
        if found is not None and loaded % 100 == 1:
            assert str(found.report)
            jax.eval_shape(found, jnp.zeros((1, *found.image_shape)))
    # Many different checks fail, and some mutants are valid networks.
    assert len(refused) > min(count, 400) / 20
    assert count / 100 < loaded < count / 2


SHARES = [pytest.param(5000, seed, marks=pytest.mark.slow) for seed in range(1, 5)]


@pytest.mark.parametrize(("count", "seed"), [(60, 0), *SHARES])
def test_damaged_files_are_refused_or_load_as_valid(parts, count, seed):
    check_mutants(parts, count, seed)
