"""The engine's C API, called through `ctypes`."""

import ctypes
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import xnor_jax as xnor
from xnor_jax import _compiled
from xnor_jax.packing import file

LIBRARY = _compiled.load()
OK, INVALID_ARGUMENT, INVALID_FILE, IO_ERROR = range(4)

needed = pytest.mark.skipif(LIBRARY is None, reason="the engine was not built")

if LIBRARY is not None:
    LIBRARY.xnor_error.restype = ctypes.c_char_p
    for _name in ("input", "output"):
        getattr(LIBRARY, f"xnor_{_name}_rank").restype = ctypes.c_size_t
        getattr(LIBRARY, f"xnor_{_name}_shape").restype = ctypes.POINTER(ctypes.c_int64)
    for _name in ("name", "dataset", "class_name", "node_kind", "node_name"):
        getattr(LIBRARY, f"xnor_{_name}").restype = ctypes.c_char_p
    for _name in ("class_count", "node_count"):
        getattr(LIBRARY, f"xnor_{_name}").restype = ctypes.c_size_t
    LIBRARY.xnor_test_accuracy.restype = ctypes.c_double


class Preprocessing(ctypes.Structure):
    """The C struct `xnor_preprocessing`."""

    _fields_ = [
        ("channels", ctypes.c_size_t),
        ("mean", ctypes.POINTER(ctypes.c_float)),
        ("std", ctypes.POINTER(ctypes.c_float)),
        ("resize", ctypes.c_size_t),
    ]


class Failure(Exception):
    """A status other than `XNOR_OK`, with its error message."""

    def __init__(self, status):
        assert LIBRARY is not None
        self.status, self.text = status, LIBRARY.xnor_error().decode()
        super().__init__(f"{status}: {self.text}")


def _check(status):
    if status != OK:
        raise Failure(status)


class Engine:
    """A network loaded from bytes or from a path."""

    def __init__(self, source):
        assert LIBRARY is not None
        self.library, self.model = LIBRARY, ctypes.c_void_p()
        place = ctypes.byref(self.model)
        if isinstance(source, bytes):
            size = ctypes.c_size_t(len(source))
            _check(LIBRARY.xnor_load_memory(source, size, place))
        else:
            _check(LIBRARY.xnor_load(str(source).encode(), place))
        self.input = self._shape("input")
        self.output = self._shape("output")

    def __del__(self):
        self.library.xnor_free(self.model)

    def _shape(self, name):
        rank = self.get(f"{name}_rank")
        return tuple(self.get(f"{name}_shape")[:rank])

    def get(self, name, *args):
        """Call a function that takes the model first, such as `xnor_input_rank`."""
        return getattr(self.library, f"xnor_{name}")(self.model, *args)

    def __call__(self, x, threads=1):
        """Map float32 or uint8 images to logits."""
        x = np.ascontiguousarray(x)
        run = {"float32": "xnor_run", "uint8": "xnor_run_uint8"}[x.dtype.name]
        y = np.full((len(x), *self.output), np.nan, np.float32)
        given, taken = (a.ctypes.data_as(ctypes.c_void_p) for a in (x, y))
        count = ctypes.c_size_t(len(x))
        _check(getattr(self.library, run)(self.model, given, count, taken, threads))
        return y


def to_bytes(packed, **info) -> bytes:
    """Serialize a packed network."""
    return file.to_bytes(packed, xnor.packing.Info(**info) if info else packed.info)


def joined(text, arrays) -> bytes:
    """Build a file with a valid checksum."""
    plain = safetensors.numpy.save(arrays)
    section = plain[8 + int.from_bytes(plain[:8], "little") :]
    total = f"{zlib.crc32(text.encode() + section):08x}"
    return safetensors.numpy.save(arrays, {"xnor_jax": text, "crc32": total})


def check(packed, x):
    """Check that the engine's logits equal the `cpu` backend's, bit for bit."""
    if LIBRARY is None:
        return
    x = np.asarray(x, np.float32)
    engine = Engine(to_bytes(packed))
    got = engine(x, 2)
    np.testing.assert_array_equal(got, packed.with_backend("cpu")(x))
    np.testing.assert_array_equal(got[:3], engine(x[:3]))


ROOT = Path(xnor.__file__).parent / "engine"
