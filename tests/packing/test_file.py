"""The file format: round trips, and errors for anything else."""

import dataclasses
import json
import os
import tracemalloc
import zlib

import jax
import numpy as np
import packed_networks
import pytest
import safetensors.numpy
from flax import nnx
from packed_networks import Net, block, conv, linear

import xnor_jax as xnor
from xnor_jax.nn import AvgPool, GlobalAveragePool, MaxPool
from xnor_jax.packing import FormatError, Preprocessing, checks, file, graph

INFO = {
    "name": "digits-lenet5",
    "preprocessing": Preprocessing((0.1307, 0.5), (0.3081, 1e-3)),
    "class_names": ("zero", "eins", "« two »"),
    "test_accuracy": 0.9987,
    "dataset": "mnist",
}


def sequence():
    """A sequential network of convolutions, blocks, pools and dense layers."""
    return Net(
        (6, 6, 2),
        conv(2, 35, (3, 3)),
        MaxPool(2, 1),
        block(35, 33, (3, 3), padding=1, feature_group_count=1),
        AvgPool(2, 1),
        block(33, 36, (2, 2), strides=2, feature_group_count=3),
        MaxPool(2, 1),
        block(36, 4, (1, 1), input_scale=True, relu=False),
        nnx.relu,
        block(4, 34, (1, 1)),
        block(34, 33, norm_features=34),
        GlobalAveragePool(),
        linear(33, 3),
    )


@pytest.fixture(scope="module")
def packed():
    return xnor.pack(packed_networks.randomized(nnx.eval_shape(sequence), exact=True))


@pytest.fixture(scope="module")
def data(packed, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "file.safetensors"
    xnor.save(path, packed, **INFO)
    return path.read_bytes()


@pytest.fixture
def load(tmp_path):
    def load(data):
        path = tmp_path / "file.safetensors"
        path.write_bytes(data)
        return xnor.load(path)

    return load


def split(data):
    """The description and arrays of a file; the inverse of `join`."""
    size = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + size])["__metadata__"]["xnor_jax"]
    return json.loads(text), safetensors.numpy.load(data)


def join(description, arrays):
    """A file of a description and arrays, with a correct checksum."""
    text = description if isinstance(description, str) else json.dumps(description)
    plain = safetensors.numpy.save(arrays)
    section = plain[8 + int.from_bytes(plain[:8], "little") :]
    checksum = f"{zlib.crc32(text.encode() + section):08x}"
    return safetensors.numpy.save(arrays, {"xnor_jax": text, "crc32": checksum})


def test_load_returns_the_saved_network(packed, data, load):
    loaded = load(data)
    assert jax.tree.structure(loaded) == jax.tree.structure(
        dataclasses.replace(packed, info=loaded.info)
    )
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(loaded), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    info = loaded.info
    assert {name: getattr(info, name) for name in INFO} == INFO
    x = packed_networks.images(3, 6, 6, 2)
    np.testing.assert_array_equal(loaded(x), packed(x))


def test_file_holds_arrays_and_no_code(packed, data):
    description, arrays = split(data)
    assert [n["kind"] for n in description["nodes"]] == [n.kind for n in packed.nodes]
    assert description["version"] == 3 and description["image_shape"] == [6, 6, 2]
    sizes = sum(array.nbytes for array in arrays.values())
    assert sizes == packed.report.bytes_after
    kernel = np.unpackbits(arrays["2.kernel"], bitorder="little")[: 9 * 35 * 33]
    model = packed_networks.randomized(nnx.eval_shape(sequence), exact=True)
    negative = np.asarray(model.runs[2].layer.kernel[...]) < 0
    np.testing.assert_array_equal(kernel.reshape(3, 3, 35, 33), negative)


def test_the_same_network_gives_the_same_bytes(packed, data, load, tmp_path):
    xnor.save(tmp_path / "again", packed, **INFO)
    assert (tmp_path / "again").read_bytes() == data
    # The loaded network's metadata is saved without being passed again.
    xnor.save(tmp_path / "again", load(data))
    assert (tmp_path / "again").read_bytes() == data
    xnor.save(tmp_path / "again", load(data), name="other")
    assert xnor.load(tmp_path / "again").info == dataclasses.replace(
        load(data).info, name="other"
    )


@pytest.mark.parametrize(
    ("network", "min_ratio"),
    [
        (xnor.models.LeNet5, 21),
        pytest.param(xnor.models.NIN, 19.5, marks=pytest.mark.slow),
    ],
)
def test_file_is_over_18_times_smaller_than_float32(network, min_ratio, tmp_path):
    model = packed_networks.randomized(
        nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))
    )
    packed = xnor.pack(model)
    xnor.save(tmp_path / "file", packed, class_names=list("abcdefghij"))
    floats = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert packed.report.bytes_before == 4 * floats
    assert 4 * floats / (tmp_path / "file").stat().st_size > min_ratio


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"class_names": ["a", "b"]}, "class_names: expected 3, got 2"),
        ({"class_names": ["a", "b", "c\x1b[2J"]}, "printable"),
        ({"name": "x" * 201}, "name: expected a string of at most"),
        ({"dataset": "a\nb"}, "dataset: expected printable char"),
        ({"test_accuracy": 99.1}, "test_accuracy: expected a finite number in range"),
        ({"test_accuracy": float("nan")}, "test_accuracy: expected a finite number"),
        (
            {"preprocessing": Preprocessing((0.5,), (1, 1))},
            "expected 2 numbers in mean",
        ),
        ({"preprocessing": Preprocessing((0, 0), (1, 0))}, "std: expected a finite"),
        (
            {"preprocessing": Preprocessing((0, 0), (1, 1), 5)},
            "expected square images of at most 5 pixels a side",
        ),
    ],
)
def test_invalid_metadata_is_refused(packed, tmp_path, info, message):
    with pytest.raises(ValueError, match=f"^save: .*{message}"):
        xnor.save(tmp_path / "file", packed, **info)
    assert not list(tmp_path.iterdir())


def test_resize_is_stored_only_if_given(packed, data, tmp_path):
    description, _ = split(data)
    assert set(description["preprocessing"]) == {"mean", "std"}
    pixels = Preprocessing((0, 0), (1, 1), 7)
    xnor.save(tmp_path / "file", packed, preprocessing=pixels)
    assert xnor.load(tmp_path / "file").info.preprocessing == pixels


def test_save_replaces_a_file_atomically(packed, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def raise_no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_no_space)
    with pytest.raises(OSError, match="No space left"):
        xnor.save(path, packed)
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_save_replaces_the_file_behind_a_link_and_no_pipe(packed, tmp_path):
    link, target, pipe = (tmp_path / name for name in ("link", "target", "pipe"))
    link.symlink_to(target)
    for _ in range(2):  # a new file, then the same again
        xnor.save(link, packed)
        assert link.is_symlink() and xnor.load(target).image_shape
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe exists and is not a regular file"):
        xnor.save(pipe, packed)
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 3
    xnor.save(tmp_path / ("x" * 250), packed)  # a temporary name must not be longer
    with pytest.raises(TypeError, match="expected a network from pack, got <function"):
        xnor.save(target, lambda x: x)


def test_threshold_dtype_fits_the_bound():
    for bound, dtype in ((32766, np.int16), (32768, np.int32)):
        member = graph.Member("integers", (4,), bound=bound)
        lowest = np.iinfo(np.int32).min
        numbers = np.int32([lowest, 1 - bound, 0, bound])
        stored = file._store(numbers, member)
        assert stored.dtype == dtype
        np.testing.assert_array_equal(file._restore(stored.data, member), numbers)


def test_truncated_or_extended_files_are_refused(data, load):
    size = int.from_bytes(data[:8], "little")
    for length in [*range(0, 12), size, size + 7, *range(size + 8, len(data), 997)]:
        with pytest.raises(
            FormatError, match="safetensors file|complete file"
        ) as error:
            load(data[:length])
        assert "\n" not in str(error.value)
    for suffix in (b"\0", b"{}", data):
        with pytest.raises(FormatError, match="expected a complete file"):
            load(data + suffix)


def test_flipped_bits_are_refused(data):
    """The checksum covers arrays and description; other checks cover the header."""
    size = int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    bits = rng.permutation(8 * len(data))
    header = bits[bits < 8 * (8 + size)]
    for bit in [*header[:2000], *bits[:500]]:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError) as error:
            file.from_bytes(bytes(changed))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    changed[-1], changed[bit // 8] = data[-1] ^ 1, data[bit // 8]
    with pytest.raises(ValueError, match="damaged: its checksum does not match; copy"):
        file.from_bytes(bytes(changed))


def change(**entries):
    def changed(description, arrays):
        return {**description, **entries}, arrays

    return changed


def change_node(index, **entries):
    def changed(description, arrays):
        description["nodes"][index] |= entries
        return description, arrays

    return changed


def change_array(name, array):
    def changed(description, arrays):
        return description, {**arrays, name: array(arrays.get(name))}

    return changed


MEAN = {"kind": "mean", "inputs": [0]}
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(version=4), "version 4, this library reads version 3; update xnor_jax"),
        (change(version=2), "version 2, which .*; pack the network again"),
        (change(version="1"), "whole number"),
        (change(format="other"), "another format"),
        (change(layout="msb first"), "layout: expected one of"),
        (change(code="import os"), "unknown entry"),
        (change(image_shape=[2**24, 2**24, 2]), r"at most \d+ numbers in an image"),
        (change(image_shape=[6, 6]), "node 0: conv: .* 1 spatial axes"),
        (change(nodes=[]), "list of 1 to 4096"),
        (change(nodes=[MEAN] * 4097), "list of 1 to 4096"),
        (change(nodes=[MEAN]), "class_names: expected 2, got 3"),
        (change(nodes=[{"kind": "sign", "inputs": [0]}]), "ends in floats"),
        (change(nodes=[{"kind": "mean", "inputs": [1]}]), "inputs from earlier nodes"),
        (change(nodes=[{"kind": "mean"}]), "expected one input, got 0"),
        (change_node(0, window=[3, 3, 3]), "node 0"),
        (change_node(0, strides=[0, 1]), "strides: expected a whole number from 1"),
        (change_node(0, padding=[[2**24, 2**24]] * 2), "positions in a padded image"),
        (change_node(0, features=2**24), r"at most \d+ weights in a kernel"),
        (change_node(0, kind="lambda"), "unknown kind of node"),
        (change_node(0, kind=["conv"]), "unknown kind of node a list"),
        (change_node(1, window=[9, 9]), "node 1: .*window"),
        (change_node(2, groups=2), "divide into 2 groups"),
        (change_node(2, epilogue="exec"), "epilogue: expected one of"),
        (change_node(0, scaled=1), "scaled: expected one of"),
        (change_node(0, scaled=True), "scale with a threshold"),
        (lambda *_: (DEEP, {}), "description to be a JSON object"),
        (lambda *_: ('{"version": ' + "9" * 5000 + "}", {}), "to be a JSON object"),
        (lambda *_: ("[1]", {}), "description to be a JSON object, got a list"),
        (lambda *_: ('{"version": NaN}', {}), "JSON object: NaN is not a JSON number"),
        (lambda *_: ('{"a": 1, "a": 1}', {}), "JSON object: duplicate keys"),
        (change_array("0.kernel", lambda a: a[:-1]), "0.kernel: expected float32 of"),
        (change_array("0.kernel", np.float64), "0.kernel: expected float32 of shape"),
        (change_array("0.kernel", lambda a: a * np.nan), "0.kernel: expected finite"),
        (change_array("2.kernel", lambda a: a | 128), "expected 0 in the unused bits"),
        (change_array("2.scale", lambda a: a * np.inf), "2.scale: expected finite"),
        (change_array("99.kernel", lambda _: np.zeros(3)), 'unknown array "99.kernel"'),
    ],
)
def test_hostile_files_are_refused_with_the_cause(data, load, changed, message):
    with pytest.raises(FormatError, match=message) as error:
        load(join(*changed(*split(data))))
    assert "file.safetensors: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-le", "utf-8-sig"])
def test_headers_in_another_encoding_are_refused(data, load, encoding):
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode().encode(encoding)
    header += " ".encode(encoding.removesuffix("-sig")) * (-len(header) % 8)
    with pytest.raises(FormatError):
        load(len(header).to_bytes(8, "little") + header + data[8 + size :])


def test_class_names_may_be_null(data):
    description, arrays = split(data)
    changed = file.from_bytes(join({**description, "class_names": None}, arrays))
    assert changed.info.class_names == ()


def test_files_without_a_checksum_are_refused(data, load):
    description, arrays = split(data)
    text = json.dumps({**description, "version": 2})
    with pytest.raises(FormatError, match="version 2, .*; pack the network again"):
        load(safetensors.numpy.save(arrays, {"xnor_jax": text}))
    text = json.dumps(description)
    with pytest.raises(FormatError, match="checksum"):
        load(safetensors.numpy.save(arrays, {"xnor_jax": text}))


def change_header(change):
    """A function that changes the header of a file and keeps its data section."""

    def changed(data):
        start = 8 + int.from_bytes(data[:8], "little")
        found = json.loads(data[8:start])
        text = change(found)
        text = (text if isinstance(text, str) else json.dumps(found)).encode()
        return len(text).to_bytes(8, "little") + text + data[start:]

    return changed


def twice(found):
    text, name = json.dumps(found), '"0.threshold": '
    return text.replace(name, name + json.dumps(found["0.threshold"]) + ", " + name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.update({"0.threshold": {"shape": [35]}}),
            "0.threshold.*expected an entry 'dtype'",
        ),
        (
            lambda f: f["0.threshold"].update(dtype="F16"),
            "0.threshold: expected float32 of",
        ),
        (
            lambda f: f["0.threshold"].update(dtype=3),
            "0.threshold.*dtype: expected a string",
        ),
        (
            lambda f: f["0.threshold"].update(shape=[36]),
            "0.threshold: expected float32 of shape",
        ),
        (
            lambda f: f["0.threshold"].update(shape=[2**70]),
            "0.threshold.*shape: expected a whole",
        ),
        (lambda f: f["0.threshold"].update(data_offsets=[0, 2]), "without gaps"),
        (
            lambda f: f["0.threshold"].update(data_offsets=[-4, 0]),
            "data_offsets: expected",
        ),
        (
            lambda f: f["0.threshold"].update(data_offsets=[0]),
            "list of 2 whole numbers",
        ),
        (lambda f: f["0.threshold"].update(data_offsets=[140, 0]), "without gaps"),
        (lambda f: f.update({"0.threshold": []}), "0.threshold.*expected an object"),
        (lambda f: f.update({"0.threshold": f.pop("0.kernel")}), "without gaps"),
        (lambda f: f["__metadata__"].update(other="1"), "checksum does not match"),
        (lambda f: f.update(__metadata__=[]), "got another file"),
        (twice, "header to be a JSON object: duplicate keys"),
    ],
)
def test_inconsistent_headers_are_refused(data, load, change, message):
    with pytest.raises(FormatError, match=message) as error:
        load(change_header(change)(data))
    assert "\n" not in str(error.value)


def test_out_of_range_thresholds_are_refused(data, load):
    description, arrays = split(data)
    name = next(n for n, a in arrays.items() if a.dtype == np.int16)
    arrays[name] = arrays[name] + np.int16(20_000)
    with pytest.raises(FormatError, match="expected thresholds of at most"):
        load(join(description, arrays))


def test_other_files_are_refused(tmp_path, load):
    with pytest.raises(FormatError, match="safetensors file"):
        load(b"PK\x03\x04 a zip with a pickle in it")
    with pytest.raises(FormatError, match="header of at most"):
        load((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match="header to be a JSON object"):
        load((10**5).to_bytes(8, "little") + b"[" * 10**5)
    with pytest.raises(FormatError, match="got another file"):
        load(safetensors.numpy.save({"a": np.zeros(3)}))
    with pytest.raises(FormatError, match="got another file"):
        load(safetensors.numpy.save({"a": np.zeros(3)}, {"other": "{}"}))
    with pytest.raises(FormatError, match="regular file"):
        xnor.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file"):
        xnor.load(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        xnor.load(tmp_path / "none")
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(checks.LARGEST_FILE + 1)
    with pytest.raises(FormatError, match="expected at most"):
        xnor.load(huge)


def test_large_kernel_loads_in_little_extra_memory():
    """Loading allocates less than a byte per weight."""
    rng = np.random.default_rng(0)
    sizes, n = (1, 8192, 4096), 8192 * 4096
    sign = {"kind": "sign", "inputs": [0]}
    layer = {"kind": "binary_conv", "inputs": [1], "features": sizes[2]}
    description = {
        "format": file.FORMAT,
        "version": file.VERSION,
        "layout": file._LAYOUT,
        "image_shape": [sizes[1]],
        "nodes": [sign, layer],
    }
    arrays = {
        "0.threshold": np.zeros(sizes[1], np.float32),
        "0.flip": np.zeros(sizes[1] // 8, np.uint8),
        "1.kernel": rng.integers(0, 256, n // 8, np.uint8),
        "1.scale": np.ones(sizes[2], np.float32),
        "1.bias": np.ones(sizes[2], np.float32),
    }
    data = join(description, arrays)
    tracemalloc.start()
    loaded = file.from_bytes(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) + 2**24
    kernel = loaded.nodes[1].arrays["kernel"]
    member = graph.Member("kernel", sizes[1:], groups=1)
    np.testing.assert_array_equal(file._store(kernel, member), arrays["1.kernel"])


def test_small_file_cannot_allocate_much_memory(data, load):
    """With one channel in and out, a bit in the file takes 1,024 bits in memory."""
    description, _ = split(data)
    side = 2**11
    sign = {"kind": "sign", "inputs": [0]}
    layer = {"kind": "binary_conv", "inputs": [1], "window": [side, side]}
    layer |= {"strides": [1, 1], "padding": [[0, 0]] * 2, "dilation": [1, 1]}
    description |= {
        "image_shape": [side, side, 1],
        "nodes": [sign, layer],
        "class_names": [],
        "preprocessing": None,
    }
    bits = np.zeros(side * side // 8, np.uint8)
    single = np.zeros(1, np.float32)
    arrays = {"1.kernel": bits, "1.scale": single, "1.bias": single}
    arrays |= {"0.threshold": single, "0.flip": np.zeros(1, np.uint8)}
    with pytest.raises(FormatError, match="bytes of arrays in memory"):
        load(join(description, arrays))
