"""The library checks its arguments: calls that no function of this package makes.

`.ci/run` runs this file again on a library under AddressSanitizer and UBSan.
"""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xnor_jax.ops import cpu

pytestmark = pytest.mark.skipif(
    not cpu.is_available(), reason="the cpu backend was not built"
)

CONV = {
    "x": jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.uint32),
    "arrays": [jax.ShapeDtypeStruct((1, 2, 3, 3, 2, 32), jnp.uint32)],
    "out": jax.ShapeDtypeStruct((1, 2, 2, 40), jnp.int32),
    "kind": 0,
    "epilogue": 0,
    "channels": 40,
    "out_channels": 40,
    "window": [1, 1],
    "strides": [1, 1],
    "padding": [0, 0, 0, 0],
    "dilation": [1, 1],
}
FLOATS = jax.ShapeDtypeStruct((1, 4, 4, 40), jnp.float32)
FLIP = jax.ShapeDtypeStruct((2,), jnp.uint32)
REAL = CONV | {
    "kind": 1,
    "x": FLOATS,
    "arrays": [jax.ShapeDtypeStruct((3, 3, 40, 40), jnp.float32)],
    "out": jax.ShapeDtypeStruct((1, 2, 2, 40), jnp.float32),
}
PACK = CONV | {
    "kind": 2,
    "x": FLOATS,
    "arrays": [],
    "out": jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.uint32),
}
PACK_FLAGS = PACK | {
    "kind": 5,
    "x": jax.ShapeDtypeStruct((1, 4, 4, 40), jnp.uint8),
    "channels": 3,
    "out": jax.ShapeDtypeStruct((1, 4, 4, 6), jnp.uint32),
}
SUM_POOL = CONV | {
    "kind": 3,
    "x": FLOATS,
    "arrays": [jax.ShapeDtypeStruct((40,), jnp.float32), FLIP],
    "window": [3, 3],
    "out": jax.ShapeDtypeStruct((1, 2, 2, 2), jnp.uint32),
}
COL2IM = CONV | {  # a 3×3 window on 4×5 images
    "kind": 4,
    "x": jax.ShapeDtypeStruct((1, 2, 3, 9 * 4), jnp.float32),
    "arrays": [],
    "channels": 4,
    "out_channels": 5,
    "window": [3, 3],
    "out": jax.ShapeDtypeStruct((1, 4, 5, 4), jnp.float32),
}
OPERATIONS = [CONV, REAL, PACK, PACK_FLAGS, SUM_POOL, COL2IM]


def call(*operations, cut=0):
    def numbers(operation):
        scalars = [operation["kind"], operation["epilogue"], 0]
        scalars += [operation["channels"], operation["out_channels"]]
        axes = ("window", "strides", "padding", "dilation")
        return scalars + [number for name in axes for number in operation[name]]

    def zeros(spec):
        return jnp.zeros(spec.shape, spec.dtype)

    attribute = [number for operation in operations for number in numbers(operation)]
    arrays = [zeros(array) for operation in operations for array in operation["arrays"]]
    y = jax.ffi.ffi_call("xnor_jax_run", operations[-1]["out"])(
        zeros(operations[0]["x"]),
        *arrays,
        operations=np.array(attribute[: len(attribute) - cut], np.int64),
    )
    return jax.block_until_ready(y)


def with_shape(spec, *shape):
    return jax.ShapeDtypeStruct(shape, spec.dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_library_runs_valid_calls(operation):
    y = np.asarray(call(operation))
    assert (y == (9 * 40 if operation is CONV else 0)).all()


OUT_OF_RANGE = {
    "strides": [[0, 1], [-1, 1], [2**62, 1]],
    "padding": [[0, 0, 0, -1], [2**62, 2**62, 0, 0]],
    "dilation": [[0, 1], [2**62, 1]],
    "window": [[0, 1], [-1, 3], [2**62, 1], [5, 1]],
    "kind": [-1, 6, 2**40],
}


@pytest.mark.parametrize(
    ("operation", "unused"),
    [(CONV, "window"), (REAL, "window"), (SUM_POOL, "dilation"), (COL2IM, None)],
)
def test_the_library_refuses_numbers_out_of_range(operation, unused):
    for name in set(OUT_OF_RANGE) - {unused}:
        for value in OUT_OF_RANGE[name]:
            with pytest.raises(Exception, match="xnor_jax: "):
                call(operation | {name: value})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_library_refuses_buffers_of_other_shapes(operation):
    x, out, arrays = operation["x"], operation["out"], operation["arrays"]
    invalid = [
        {"x": with_shape(x, *x.shape[:3])},
        {"x": with_shape(x, *x.shape[:3], 0)},
        {"x": with_shape(x, 0, *x.shape[1:])},
        {"x": jax.ShapeDtypeStruct(x.shape, jnp.int32)},
        {"x": jax.ShapeDtypeStruct(x.shape, jnp.float16)},
        {"out": with_shape(out, *out.shape[1:])},
        {"out": with_shape(out, 2, *out.shape[1:])},
        {"out": with_shape(out, *out.shape[:3], out.shape[3] + 1)},
        {"out": with_shape(out, 1, out.shape[1] + 1, *out.shape[2:])},
        {"out": jax.ShapeDtypeStruct(out.shape, jnp.int16)},
        {"arrays": [*arrays, FLIP]},
        *({"arrays": arrays[:i] + arrays[i + 1 :]} for i in range(len(arrays))),
        *(
            {"arrays": arrays[:i] + [invalid] + arrays[i + 1 :]}
            for i, array in enumerate(arrays)
            for invalid in (
                with_shape(array, *array.shape, 1),
                with_shape(array, *array.shape[:-1], array.shape[-1] + 1),
                with_shape(array, *array.shape[:-1], array.shape[-1] - 1),
                jax.ShapeDtypeStruct(array.shape, jnp.int32),
            )
        ),
    ]
    if operation not in (PACK, PACK_FLAGS, COL2IM):
        invalid += [{"x": with_shape(x, 1, 2, *x.shape[2:])}]  # smaller than the window
    for changed in invalid:
        with pytest.raises(Exception, match="xnor_jax: "):
            call(operation | changed)


@pytest.mark.parametrize(
    "changed",
    [
        *({"channels": value} for value in (0, 32, 65, -40, 2**40)),
        *({"out_channels": value} for value in (0, 32, 65, 2**40)),
        *({"epilogue": value} for value in (-1, 1, 2, 3)),
        {"arrays": [jax.ShapeDtypeStruct((1, 2, 0, 3, 2, 32), jnp.uint32)]},
        {"arrays": [jax.ShapeDtypeStruct((2, 2, 3, 3, 2, 32), jnp.uint32)]},
        {"x": jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.uint32)},
    ],
)
def test_the_library_refuses_mismatched_channels(changed):
    with pytest.raises(Exception, match="xnor_jax: "):
        call(CONV | changed)


@pytest.mark.parametrize(
    "changed",
    [
        *({"channels": value} for value in (-1, 0, 2, 5, 2**40)),
        *({"out_channels": value} for value in (-1, 0, 2, 6, 2**40)),
        {"x": with_shape(FLOATS, 1, 2, 3, 35)},
        {"x": with_shape(FLOATS, 1, 3, 2, 36)},
        {"x": with_shape(CONV["x"], 1, 2, 3, 36)},
    ],
)
def test_the_library_refuses_mismatched_patches(changed):
    with pytest.raises(Exception, match="xnor_jax: "):
        call(COL2IM | changed)


@pytest.mark.parametrize("count", [-1, 0, 2, 9, 2**40])
def test_the_library_refuses_mismatched_flags(count):
    with pytest.raises(Exception, match="xnor_jax: "):
        call(PACK_FLAGS | {"channels": count})


def test_uint8_input_is_refused_except_for_flags():
    for operation in OPERATIONS:
        if operation is not PACK_FLAGS:
            x = jax.ShapeDtypeStruct(operation["x"].shape, jnp.uint8)
            with pytest.raises(Exception, match="xnor_jax: expected"):
                call(operation | {"x": x})


def test_the_library_refuses_mismatched_chains():
    with pytest.raises(Exception, match="xnor_jax: expected floats"):
        call(PACK, CONV, PACK | {"x": CONV["out"]})  # signs of integers
    with pytest.raises(Exception, match="xnor_jax: expected words of signs"):
        call(REAL, CONV)
    message = "xnor_jax: expected one or more whole operations"
    for cut in (1, 15):
        with pytest.raises(Exception, match=message):
            call(PACK, cut=cut)
    y = np.asarray(call(PACK, CONV))
    assert (y == 9 * 40).all()


def test_sizes_are_checked_before_allocation():
    begin = time.perf_counter()
    for operation in (CONV, REAL):
        for padding in ([0, 0, 2**27, 0], [2**31 - 1, 2**31 - 1, 0, 0]):
            with pytest.raises(
                Exception, match="xnor_jax: the result does not have the shape"
            ):
                call(operation | {"padding": padding})
    huge = {"window": [1, 2**31 - 1], "padding": [0, 0, 2**31 - 1, 2**30]}
    with pytest.raises(Exception, match="xnor_jax: the result does not have the shape"):
        call(SUM_POOL | huge)
    assert time.perf_counter() - begin < 10


GRADIENT = {
    "x": jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.uint32),
    "others": jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.uint32),
    "gradient": jax.ShapeDtypeStruct((2, 2, 2, 5), jnp.float32),
    "out": jax.ShapeDtypeStruct((3, 3, 40, 5), jnp.float32),
    "way": [1, 1, 0, 0, 0, 0, 1, 1],
}


def gradient(spec):
    arrays = [jnp.zeros(spec[k].shape, spec[k].dtype) for k in list(GRADIENT)[:3]]
    call = jax.ffi.ffi_call("xnor_jax_kernel_gradient", spec["out"])
    return jax.block_until_ready(call(*arrays, way=np.array(spec["way"], np.int64)))


def test_valid_kernel_gradient_runs():
    assert (gradient(GRADIENT) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"way": [1] * 7}, "expected two strides"),
        ({"way": [0, 1, 0, 0, 0, 0, 1, 1]}, "a stride is out of range"),
        ({"way": [1, 1, -1, 0, 0, 0, 1, 1]}, "a padding is out of range"),
        ({"way": [1, 1, 0, 0, 0, 0, 2, 1]}, "larger than the padded image"),
        ({"way": [2, 1, 0, 0, 0, 0, 1, 1]}, "the shape of the convolution's result"),
        ({"way": [1, 1, 2**31 - 1, 0, 2**31 - 1, 0, 1, 1]}, "result"),
        ({"x": ((2, 4, 4, 1), jnp.uint32)}, "first ones' type and shape"),
        ({"others": ((2, 4, 4, 2), jnp.float32)}, "first ones' type and shape"),
        ({"out": ((3, 3, 70, 5), jnp.float32)}, "do not have the kernel's channels"),
        ({"out": ((3, 3, 40, 6), jnp.float32)}, "the convolution's result"),
        ({"out": ((3, 3, 40), jnp.float32)}, "four axes"),
        ({"gradient": ((1, 2, 2, 5), jnp.float32)}, "the convolution's result"),
        ({"gradient": ((2, 2, 2, 0), jnp.float32)}, "a size is out of range"),
        (
            {"x": ((2, 4, 4, 2), jnp.int32), "others": ((2, 4, 4, 2), jnp.int32)},
            "expected float32 or uint32",
        ),
    ],
)
def test_invalid_kernel_gradient_is_refused(change, message):
    change = {
        name: value if name == "way" else jax.ShapeDtypeStruct(*value)
        for name, value in change.items()
    }
    with pytest.raises(Exception, match=message):
        gradient(GRADIENT | change)


SUMS = {
    "a": ((2, 4, 5), jnp.float32),
    "x": ((2, 4, 5), jnp.float32),
    "center": ((5,), jnp.float32),
    "out": ((2, 5), jnp.float32),
}


def channel_sums(spec):
    *arrays, out = (jax.ShapeDtypeStruct(*value) for value in spec.values())
    buffers = (jnp.zeros(array.shape, array.dtype) for array in arrays)
    return jax.block_until_ready(
        jax.ffi.ffi_call("xnor_jax_channel_sums", out)(*buffers)
    )


def test_valid_channel_sums_run():
    assert (channel_sums(SUMS) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": ((2, 4, 6), jnp.float32)}, "two arrays of one shape"),
        ({"x": ((8, 5), jnp.float32)}, "two arrays of one shape"),
        ({"a": ((), jnp.float32), "x": ((), jnp.float32)}, "two arrays of one shape"),
        ({"a": ((0, 5), jnp.float32), "x": ((0, 5), jnp.float32)}, "out of range"),
        ({"center": ((4,), jnp.float32)}, "a center for each channel"),
        ({"center": ((5, 1), jnp.float32)}, "a center for each channel"),
        ({"out": ((3, 5), jnp.float32)}, "two sums for each channel"),
        ({"out": ((10,), jnp.float32)}, "two sums for each channel"),
        ({"x": ((2, 4, 5), jnp.int32)}, "Wrong buffer dtype"),
        ({"out": ((2, 5), jnp.int32)}, "Wrong buffer dtype"),
    ],
)
def test_invalid_channel_sums_are_refused(change, message):
    with pytest.raises(Exception, match=message):
        channel_sums(SUMS | change)


def test_keep_preserves_the_values_and_the_size():
    x = jnp.arange(6.0)
    for shape in ((6,), (2, 3)):
        out = jax.ShapeDtypeStruct(shape, jnp.float32)
        y = jax.ffi.ffi_call("xnor_jax_keep", out)(x)
        np.testing.assert_array_equal(y.reshape(-1), x)
    with pytest.raises(Exception, match="a result of the array's size"):
        jax.ffi.ffi_call("xnor_jax_keep", jax.ShapeDtypeStruct((5,), jnp.float32))(x)


NETWORK = {
    "x": ((2, 40), jnp.float32),
    "arrays": [
        ((40,), jnp.float32),
        ((2,), jnp.uint32),
        ((1, 1, 2, 32), jnp.uint32),
        ((7,), jnp.float32),
        ((7,), jnp.float32),
        ((3,), jnp.int32),
    ],
    "out": ((2, 3), jnp.float32),
    "image_shape": [40],
    "nodes": [
        {"kind": "sign", "inputs": [0]},
        {"kind": "binary_conv", "inputs": [1], "features": 7},
        {"kind": "take", "inputs": [2], "shape": [3]},
    ],
    "fill": 0,
}


def network(spec):
    cpu._register_network()
    buffers = [jnp.full(*array[:1], spec["fill"], array[1]) for array in spec["arrays"]]
    call = jax.ffi.ffi_call("xnor_jax_network", jax.ShapeDtypeStruct(*spec["out"]))
    nodes = spec["nodes"]
    return jax.block_until_ready(
        call(
            jnp.ones(*spec["x"]),
            *buffers,
            image_shape=np.array(spec["image_shape"], np.int64),
            nodes=nodes if isinstance(nodes, str) else json.dumps(nodes),
        )
    )


def test_valid_network_runs():
    assert (network(NETWORK) == 0).all()
    assert (network(NETWORK | {"fill": 1}) == 40 + 1).all()


def without_array(index):
    arrays = list(NETWORK["arrays"])
    del arrays[index]
    return arrays


def with_array(index, shape, dtype):
    arrays = list(NETWORK["arrays"])
    arrays[index] = (shape, dtype)
    return arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": "[{"}, "the nodes"),
        ({"nodes": []}, "expected a list of 1 to 4096 nodes"),
        (
            {"nodes": [{"kind": "sign", "inputs": [1]}]},
            "node 0: expected inputs from earlier nodes",
        ),
        ({"nodes": [{"kind": "signs", "inputs": [0]}]}, "node 0: unknown kind"),
        (
            {"nodes": [{"kind": "pool", "inputs": [0], "function": "mean"}]},
            "node 0: function: expected one of max, min, sum",
        ),
        ({"nodes": NETWORK["nodes"][:1]}, "ends in floats"),
        ({"image_shape": [41]}, "the array threshold has the wrong type or shape"),
        ({"image_shape": [0]}, "a size is out of range"),
        ({"image_shape": [-40]}, "a size is out of range"),
        ({"image_shape": [2**62, 40]}, "a size is out of range"),
        ({"image_shape": [2**24, 40]}, "too many numbers"),
        ({"x": ((2, 41), jnp.float32)}, "expected a batch of images"),
        ({"x": ((2, 1, 40), jnp.float32)}, "expected a batch of images"),
        ({"x": ((0, 40), jnp.float32)}, "expected a batch of images"),
        ({"x": ((2, 40), jnp.int32)}, "Wrong buffer dtype"),
        ({"out": ((2, 4), jnp.float32)}, "the result has the wrong shape"),
        ({"out": ((1, 3), jnp.float32)}, "a result for each image"),
        ({"out": ((2, 3), jnp.int32)}, "Wrong buffer dtype"),
        *(
            ({"arrays": without_array(index)}, "expected the arrays of the nodes")
            for index in (0, 5)
        ),
        ({"arrays": [*NETWORK["arrays"], ((1,), jnp.int32)]}, "arrays of the nodes"),
        ({"arrays": with_array(0, (40, 1), jnp.float32)}, "the array threshold"),
        ({"arrays": with_array(0, (40,), jnp.int32)}, "the array threshold"),
        ({"arrays": with_array(1, (1,), jnp.uint32)}, "the array flip"),
        ({"arrays": with_array(2, (1, 1, 1, 32), jnp.uint32)}, "the array kernel"),
        ({"arrays": with_array(2, (1, 2, 32), jnp.uint32)}, "the array kernel"),
        ({"arrays": with_array(4, (8,), jnp.float32)}, "the array bias"),
        ({"arrays": with_array(5, (4,), jnp.int32)}, "the array places"),
        ({"fill": 7}, "an index is out of range"),
        ({"fill": -1}, "an index is out of range"),
    ],
)
def test_invalid_networks_are_refused(change, message):
    with pytest.raises(Exception, match=message):
        network(NETWORK | change)
