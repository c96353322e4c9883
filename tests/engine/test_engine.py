"""The engine's C API: the packed network's logits, computed from its file alone.

`tests/packing/test_compiler.py` runs each of its networks in the engine too. `.ci/run`
runs this file again on a library under AddressSanitizer and UBSan.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import c_engine
import jax.numpy as jnp
import numpy as np
import packed_networks
import pytest
import safetensors.numpy
from flax import nnx

import xnor_jax as xnor
from xnor_jax.ops import cpu
from xnor_jax.packing import Preprocessing, file

TESTS = Path(__file__).parent.parent
pytestmark = c_engine.needed


@pytest.fixture(scope="module")
def lenet5():
    model = packed_networks.randomized(
        nnx.eval_shape(lambda: xnor.models.LeNet5(rngs=nnx.Rngs(0)))
    )
    return xnor.pack(model, backend="cpu")


@pytest.fixture(scope="module")
def tiny():
    model = packed_networks.randomized(nnx.eval_shape(packed_networks.tiny), exact=True)
    return xnor.pack(model)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_lenet5_equals_the_cpu_backend(lenet5):
    engine = c_engine.Engine(c_engine.to_bytes(lenet5))
    assert (engine.input, engine.output) == ((28, 28, 1), (10,))
    x = normal(130, 28, 28, 1)
    chosen = cpu.instruction_set()
    try:
        for name in cpu.instruction_sets():
            cpu.use_instruction_set(name)
            wanted = np.asarray(lenet5(x))
            for threads in (1, 2, 3):
                np.testing.assert_array_equal(engine(x, threads), wanted)
            np.testing.assert_array_equal(engine(x[:1]), np.asarray(lenet5(x[:1])))
    finally:
        cpu.use_instruction_set(chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (xnor.models.NIN, (12, 10, 3)),
        (xnor.models.ResNet20, (12, 12, 3)),
        (xnor.models.BiRealNet18, (32, 32, 3)),
    ],
)
def test_published_networks_match_cpu_and_xla(make, shape):
    """The logits equal the `cpu` backend's bit for bit, and `xla`'s to rounding."""
    model = packed_networks.randomized(
        nnx.eval_shape(lambda: make(image_shape=shape, rngs=nnx.Rngs(0)))
    )
    packed = xnor.pack(model, backend="xla")
    x = normal(16, *shape)
    c_engine.check(packed, x)
    wanted = np.asarray(packed(x))
    got = c_engine.Engine(c_engine.to_bytes(packed))(x)
    far = np.abs(got - wanted) > 1e-5 * np.abs(wanted).max()
    assert far.any(-1).sum() <= 1  # image: the rounding of a sum may flip a sign


@pytest.mark.slow
@pytest.mark.parametrize("name", ["signals", "volumes"])
def test_networks_with_1_and_3_spatial_axes(name):
    make = getattr(packed_networks, name)
    model = packed_networks.randomized(nnx.eval_shape(make), exact=True)
    packed = xnor.pack(model, backend="xla")
    x = packed_networks.images(9, *packed.image_shape)
    c_engine.check(packed, x)


def test_engine_reads_the_file_metadata(tiny, tmp_path):
    pixels = Preprocessing((0.25,), (0.5,))
    path = tmp_path / "tiny"
    info = {"class_names": ("a", "ß", "c"), "name": "tiny", "test_accuracy": 0.5}
    xnor.save(path, tiny, preprocessing=pixels, **info)
    engine = c_engine.Engine(path)
    assert engine.get("name") == b"tiny" and engine.get("dataset") is None
    assert engine.get("test_accuracy") == 0.5
    count = engine.get("class_count")
    names = [
        engine.get("class_name", c_engine.ctypes.c_size_t(i)) for i in range(count)
    ]
    assert [name.decode() for name in names] == list(info["class_names"])
    kinds = [
        engine.get("node_kind", c_engine.ctypes.c_size_t(i)).decode()
        for i in range(engine.get("node_count"))
    ]
    assert kinds == [node.kind for node in tiny.nodes]
    found = c_engine.Preprocessing()
    assert engine.get("get_preprocessing", c_engine.ctypes.byref(found)) == 1
    assert (found.channels, found.mean[0], found.std[0], found.resize) == (
        1,
        0.25,
        0.5,
        0,
    )
    x = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 1), np.uint8)
    np.testing.assert_array_equal(engine(x), engine(np.asarray(pixels(x))))


def test_threads_share_one_model(tiny):
    engine = c_engine.Engine(c_engine.to_bytes(tiny))
    x = np.asarray(packed_networks.images(40, 6, 5, 1))
    wanted, found = engine(x), []

    def call(threads):
        found.extend(engine(x, threads) for _ in range(20))

    workers = [threading.Thread(target=call, args=(n % 3,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 120
    assert all((y == wanted).all() for y in found)


def test_errors_have_a_status_and_one_line(tiny, tmp_path):
    data = c_engine.to_bytes(tiny)
    for source, status, message in (
        (tmp_path / "nothing", c_engine.IO_ERROR, "nothing: No such file"),
        (tmp_path, c_engine.INVALID_FILE, "expected a regular file"),
        (b"", c_engine.INVALID_FILE, "a safetensors file"),
        (data[:-1], c_engine.INVALID_FILE, ""),
        (data.replace(b'version\\":3', b'version\\":1'), 2, "pack the network again"),
        (data.replace(b'version\\":3', b'version\\":4'), 2, "update"),
        (data[:-1] + b"?", c_engine.INVALID_FILE, "checksum"),
        (tmp_path / "a\nb\x1b[31m", c_engine.IO_ERROR, "a?b?[31m: No such file"),
    ):
        with pytest.raises(c_engine.Failure) as failure:
            c_engine.Engine(source)
        assert failure.value.status == status and message in failure.value.text
        assert "\n" not in failure.value.text
    with pytest.raises(c_engine.Failure, match="preprocessing") as failure:
        c_engine.Engine(data)(np.zeros((1, 6, 5, 1), np.uint8))
    assert failure.value.status == c_engine.INVALID_ARGUMENT


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_locale(tiny, tmp_path):
    """A comma is the decimal point in many locales."""
    made = tmp_path / "de_DE.UTF-8"
    localedef = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(made)]
    if not shutil.which("localedef") or subprocess.run(localedef).returncode > 1:
        pytest.skip("needs localedef and the definition of de_DE")
    path = tmp_path / "net"
    path.write_bytes(c_engine.to_bytes(tiny, test_accuracy=0.75))
    code = f"""
import locale
import c_engine
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
assert locale.localeconv()["decimal_point"] == ","
print(c_engine.Engine({str(path)!r}).get("test_accuracy"))
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LOCPATH": str(tmp_path), "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "0.75"


@pytest.mark.parametrize(("channels", "valid"), [(2_000, True), (50_000, False)])
def test_both_readers_bound_the_memory_of_depthwise_kernels(channels, valid):
    """The engine pads each group's output channels to 32."""
    window = {"window": [3, 3], "strides": [1, 1], "dilation": [1, 1]}
    padding = {"padding": [[1, 1], [1, 1]]}
    node = {"kind": "conv", "inputs": [0], "features": channels, "groups": channels}
    text = json.dumps(
        {
            "format": file.FORMAT,
            "version": file.VERSION,
            "layout": file._LAYOUT,
            "image_shape": [3, 3, channels],
            "nodes": [node | window | padding],
        }
    )
    kernel, bias = np.ones((3, 3, 1, channels), "f"), np.zeros(channels, "f")
    data = c_engine.joined(text, {"0.kernel": kernel, "0.bias": bias})
    if valid:
        assert file.from_bytes(data).image_shape == c_engine.Engine(data).input
        return
    with pytest.raises(ValueError, match="bytes of arrays in memory"):
        file.from_bytes(data)
    with pytest.raises(c_engine.Failure, match="too much memory"):
        c_engine.Engine(data)


def test_both_readers_refuse_the_same_files(tiny):
    """Change the description's numbers and words, shapes, offsets and bytes."""
    data = c_engine.to_bytes(tiny)
    size = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + size])["__metadata__"]["xnor_jax"]
    arrays = safetensors.numpy.load(data)
    rng = random.Random(0)
    replacements = [
        "0",
        "-1",
        "3",
        "64",
        "99999999",
        "1.5",
        "null",
        "[1]",
        "[]",
        '"max"',
        "{}",
    ]
    positions = [position for position, c in enumerate(text) if c in '0123456789[{"']
    accepted = 0
    for _ in range(300):
        position = rng.choice(positions)
        end = position + rng.choice([1, 1, 2, 5])
        changed = text[:position] + rng.choice(replacements) + text[end:]
        mutant = c_engine.joined(changed, arrays)
        try:
            loaded = file.from_bytes(mutant)
        except ValueError:
            with pytest.raises(c_engine.Failure) as failure:
                c_engine.Engine(mutant)
            assert failure.value.status == c_engine.INVALID_FILE
            continue
        accepted += 1
        engine = c_engine.Engine(mutant)
        assert engine.input == loaded.image_shape
    assert 0 < accepted < 300
    for _ in range(100):
        position = rng.randrange(len(data))
        mutant = data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :]
        try:
            file.from_bytes(mutant)
        except ValueError:
            with pytest.raises(c_engine.Failure):
                c_engine.Engine(mutant)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The engine's command, built by CMake alone, for an emulated Arm if possible."""
    cmake = shutil.which("cmake")
    if cmake is None or not (c_engine.ROOT / "CMakeLists.txt").exists():
        pytest.skip("no cmake, or no sources")
    build = tmp_path_factory.mktemp("build")
    options = ["-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    emulator, cross = shutil.which("qemu-aarch64"), "aarch64-linux-gnu-g++"
    if emulator and shutil.which(cross):
        options += ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
        options += [f"-DCMAKE_CXX_COMPILER={cross}", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    else:
        emulator = None
    subprocess.run([cmake, "-S", c_engine.ROOT, "-B", build, *options], check=True)
    subprocess.run([cmake, "--build", build, "--target", "xnor_command"], check=True)

    def run(*args, **options):
        words = [*filter(None, [emulator]), build / "xnor", *args]
        return subprocess.run(words, **{"capture_output": True, **options})

    return run


@pytest.mark.slow
def test_command_runs_and_describes_a_file(command, lenet5, tmp_path):
    path = tmp_path / "lenet5.safetensors"
    xnor.save(path, lenet5)
    x = normal(5, 28, 28, 1)
    args = ["run", path, "--threads", "2", "--batch", "2"]
    y = np.frombuffer(command(*args, input=x.tobytes()).stdout, np.float32)
    expected = jnp.concatenate([lenet5(image[None]) for image in x])
    np.testing.assert_array_equal(y.reshape(5, 10), expected)
    assert b"28 x 28 x 1" in command("info", path).stdout
    failed = command("info", tmp_path / "nothing")
    assert failed.returncode == 1 and failed.stderr.count(b"\n") == 1
    for args in (("info", path), ("bench", path, "--batch", "1"), ("--help",)):
        with open("/dev/full", "wb") as full:
            failed = command(*args, capture_output=False, stdout=full, stderr=-1)
        assert failed.returncode == 1
        assert failed.stderr == b"xnor: standard output: No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion-lenet5", "cifar10-nin", "cifar10-resnet20"])
def test_command_gives_the_same_logits_on_another_processor(command, name):
    packed = xnor.zoo.load(name, backend="cpu")
    x = normal(3, *packed.image_shape)
    found = command("run", xnor.zoo.find(name), input=x.tobytes())
    y, expected = np.frombuffer(found.stdout, np.float32), np.asarray(packed(x)).ravel()
    if cpu.instruction_set() == "portable":  # products and sums are rounded separately
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(y, expected)
