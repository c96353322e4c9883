"""Each kind of node in the engine, compared with NumPy, in hand-written files."""

import itertools
import json
import math

import c_engine
import numpy as np
import pytest

pytestmark = c_engine.needed

LAYOUT = "bit 1 is -1; least significant bit first; C order of [*window, in, out]"


def run(x, *nodes):
    """Run nodes, given as their entries and `arrays`; return the last node's result.

    A node without `inputs` reads the previous node's result.
    """
    entries, arrays = [], {}
    for index, node in enumerate(nodes):
        node = {"inputs": [index], **node}
        node_arrays = node.pop("arrays", {})
        arrays |= {f"{index}.{name}": np.asarray(a) for name, a in node_arrays.items()}
        entries.append(node)
    text = json.dumps(
        {
            "format": "xnor_jax packed network",
            "version": 3,
            "layout": LAYOUT,
            "image_shape": x.shape[1:],
            "nodes": entries,
        }
    )
    engine = c_engine.Engine(c_engine.joined(text, arrays))
    y = engine(x.astype(np.float32), 2)
    np.testing.assert_array_equal(engine(x[:1].astype(np.float32)), y[:1])
    return y


def quarters(*shape, seed=0):
    """Draw multiples of 1/4: sums of their products are exact in any order."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-8, 9, shape) / 4).astype(np.float32)


def signs(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.choice(np.float32([-1, 1]), shape)


def packed(signs):
    return np.packbits(signs.ravel() < 0, bitorder="little")


def to_bits(channels):
    """A node that takes the signs of its input."""
    flip, threshold = np.ones(channels), np.zeros(channels, np.float32)
    return {"kind": "sign", "arrays": {"threshold": threshold, "flip": packed(flip)}}


# A node that converts its input, floats or bits, to floats: it multiplies by 1.
TO_FLOATS = {
    "kind": "elementwise",
    "function": "mul",
    "operands": [0, -1],
    "shapes": [[], [1]],
    "arrays": {"constant1": np.ones(1, np.float32)},
}

UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.round,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": lambda x: np.log(np.abs(x)),
    "log1p": lambda x: np.log1p(np.abs(x)),
    "tanh": np.tanh,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "sqrt": lambda x: np.sqrt(np.abs(x)),
    "rsqrt": lambda x: 1 / np.sqrt(np.abs(x)),
    "cbrt": np.cbrt,
    "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc),
    "square": np.square,
}
POSITIVE_ONLY = ("log", "log1p", "sqrt", "rsqrt")


@pytest.mark.parametrize("name", UNARY)
def test_unary_functions(name):
    x = np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)
    x = np.abs(x) if name in POSITIVE_ONLY else x
    node = {"kind": "elementwise", "function": name, "operands": [0], "shapes": [[]]}
    np.testing.assert_allclose(run(x, node), UNARY[name](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("exponent", [-3, -1, 0, 1, 2, 7])
def test_integer_powers(exponent):
    x = 0.5 + np.random.default_rng(0).random((4, 9)).astype(np.float32)
    node = {"kind": "elementwise", "function": "integer_pow", "exponent": exponent}
    y = run(x, node | {"operands": [0], "shapes": [[]]})
    np.testing.assert_allclose(y, x.astype(float) ** exponent, rtol=1e-5)


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "rem": np.fmod,
    "pow": np.power,
    "atan2": np.arctan2,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "eq": np.equal,
    "ne": np.not_equal,
}
COMPARISONS = ("ge", "gt", "le", "lt", "eq", "ne")
SHAPES = [(3, 4, 5), (5,), (1, 4, 1), (3, 1, 5), (1,), (), (4, 5), (3, 1, 1)]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("shape", SHAPES)
def test_binary_functions_broadcast(name, shape):
    x, other = quarters(6, 3, 4, 5), quarters(*shape, seed=1)
    other = np.where(other == 0, np.float32(1.5), other)
    x = np.abs(x) + np.float32(0.25) if name == "pow" else x
    node = {"kind": "elementwise", "function": name, "operands": [0, -1]}
    node |= {"shapes": [[], list(shape)], "arrays": {"constant1": other}}
    conversion = (
        [{"kind": "elementwise", "function": "to_float"}] if name in COMPARISONS else []
    )
    conversion = [m | {"operands": [0], "shapes": [[]]} for m in conversion]
    wanted = BINARY[name](x, other)
    np.testing.assert_allclose(run(x, node, *conversion), wanted, rtol=1e-5)
    # Swapped operands, both of them results of nodes.
    if len(shape) == 3 and name not in ("pow", "rem"):
        reduce = {"kind": "reduce", "function": "max", "inputs": [0]}
        axes = [axis + 1 for axis in range(3) if shape[axis] == 1]
        reshape = {"kind": "reshape", "shape": list(shape)}
        combine = {"kind": "elementwise", "function": name, "inputs": [2, 0]}
        combine |= {"operands": [0, 1], "shapes": [[], []]}
        if name == "div":
            x = np.where(x == 0, np.float32(0.75), x)
        wanted = BINARY[name](x.max(tuple(axes), keepdims=True), x)
        got = run(x, reduce | {"axes": axes}, reshape, combine, *conversion)
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_comparisons_and_selection():
    x = quarters(4, 3, 6)

    def node(function, inputs, operands, shapes=None, **arrays):
        shapes = shapes or [[]] * len(operands)
        found = {"kind": "elementwise", "function": function, "inputs": inputs}
        return found | {"operands": operands, "shapes": shapes, "arrays": arrays}

    half = np.float32([0.5])
    greater = node("gt", [0], [0, -1], [[], [1]], constant1=half)
    less = node("lt", [0], [0, -1], [[], [1]], constant1=-half)
    pick = node("select", [7, 0], [0, 1, -1], [[], [], [1]], constant2=half)
    y = run(
        x,
        greater,  # 1
        less,  # 2
        node("or", [1, 2], [0, 1]),  # 3
        node("not", [3], [0]),  # 4
        node("and", [1, 2], [0, 1]),  # 5
        node("xor", [4, 1], [0, 1]),  # 6
        node("or", [5, 6], [0, 1]),  # 7
        pick,
        node(
            "clamp", [8], [-1, 0, -1], [[1], [], [1]], constant0=-half, constant2=half
        ),
    )
    over, under = x > 0.5, x < -0.5
    condition = (over & under) | (~(over | under) ^ over)
    np.testing.assert_array_equal(y, np.clip(np.where(condition, 0.5, x), -0.5, 0.5))


def test_every_step_of_an_affine_function_is_rounded():
    """Fused, these sums would be 2⁻²⁴ instead of 0."""
    x = np.full((3, 37), 1 + 2.0**-12, np.float32)
    squared = np.float32(x[0, 0] * x[0, 0])
    ones, zeros = np.ones(37, np.float32), np.zeros(37, np.float32)
    affine = {"mean": zeros, "scale": ones * x[0, 0], "bias": -ones * squared}
    assert not run(x, {"kind": "norm", "arrays": affine}).any()
    signs = ones - 2 * (np.arange(37) % 2)
    product = {
        "kind": "binary_conv",
        "features": 1,
        "arrays": {
            "kernel": packed(signs),
            "scale": np.float32([0.1]),
            "bias": np.float32([-0.1 * np.float32(3)]),
        },
    }
    # 20 products of +1 and 17 of −1: 3 · α, rounded, minus itself.
    y = run(signs * np.where(np.arange(37) < 20, 1, -1)[None], to_bits(37), product)
    np.testing.assert_array_equal(
        y, np.float32(0.1) * np.float32(3) + np.float32(-0.1 * np.float32(3))
    )


@pytest.mark.parametrize("channels", [5, 33, 40])
def test_subnormal_numbers_at_any_place(channels):
    """In vectors and after the last whole one, in a batch and alone."""
    x = np.full((3, channels), 1e-40, np.float32)
    largest = {"kind": "elementwise", "function": "max", "operands": [0, 0]}
    y = run(x, largest | {"shapes": [[], []]})  # checks the first image alone, too
    assert (y == y[0, 0]).all()
    one, alone = np.ones(1, np.float32), {"operands": [0], "shapes": [[]]}
    above = {"function": "lt", "operands": [0, -1], "shapes": [[], [1]]}
    nodes = (
        {"kind": "elementwise", "arrays": {"constant1": one}, **above},
        {"kind": "pad", "padding": [[1, 1]], "value": 1e-40},
        {"kind": "elementwise", "function": "to_float", **alone},
    )
    np.testing.assert_array_equal(run(x, *nodes)[0], [0, *[1] * channels, 0])


@pytest.mark.parametrize("name", ["sum", "max", "min"])
@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (1, 2), (1, 3), (3, 2), (1, 2, 3)])
def test_reductions(name, axes):
    x = quarters(5, 3, 4, 6)
    node = {"kind": "reduce", "function": name, "axes": list(axes)}
    if len(axes) == 3:
        after = {"kind": "reshape", "shape": [1]}
        wanted = getattr(np, name)(x, axes)[:, None]
        np.testing.assert_array_equal(run(x, node, after), wanted)
        return
    np.testing.assert_array_equal(run(x, node), getattr(np, name)(x, axes))


MOVES = [
    ({"kind": "transpose", "order": [3, 1, 2]}, lambda x: x.transpose(0, 3, 1, 2)),
    ({"kind": "transpose", "order": [2, 1, 3]}, lambda x: x.transpose(0, 2, 1, 3)),
    ({"kind": "reshape", "shape": [-1]}, lambda x: x.reshape(len(x), -1)),
    ({"kind": "reshape", "shape": [-2]}, lambda x: x.reshape(len(x), -1, x.shape[3])),
    (
        {"kind": "pad", "padding": [[1, 2], [0, 1], [3, 0]], "value": 1.0},
        lambda x: np.pad(x, ((0, 0), (1, 2), (0, 1), (3, 0)), constant_values=1),
    ),
    ({"kind": "slice", "strides": [2, 1, 1]}, lambda x: x[:, 1:3:2, :, : x.shape[3]]),
    (
        {"kind": "slice", "strides": [1, 2, 1]},
        lambda x: x[:, 1:3, ::2, x.shape[3] // 2 :],
    ),
    ({"kind": "slice", "strides": [1, 1, 3]}, lambda x: x[:, 1:3, :, ::3]),
]


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("channels", [5, 40, 64])
@pytest.mark.parametrize("index", range(len(MOVES)))
def test_data_movement(index, channels, bits):
    node, move = MOVES[index]
    x = signs(3, 3, 4, channels) if bits else quarters(3, 3, 4, channels)
    node = dict(node)
    wanted = move(x)
    if node["kind"] == "reshape":
        node["shape"] = list(wanted.shape[1:])
    if node["kind"] == "slice":
        first = [1, 0, channels // 2 if index == 6 else 0]
        node |= {"start": first, "stop": [3, 4, channels]}
    before = [to_bits(channels)] if bits else []
    np.testing.assert_array_equal(run(x, *before, node, TO_FLOATS), wanted)


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("channels", [7, 32])
def test_concatenate_take_and_broadcast(channels, axis, bits):
    x = signs(3, 2, 3, channels) if bits else quarters(3, 2, 3, channels)
    before = [to_bits(channels)] if bits else []
    first = len(before)
    concatenate = {"kind": "concatenate", "axis": axis, "inputs": [first] * 3}
    wanted = np.concatenate([x] * 3, axis)
    np.testing.assert_array_equal(run(x, *before, concatenate, TO_FLOATS), wanted)
    places = np.random.default_rng(0).integers(0, x[0].size, (4, 9)).astype(np.int32)
    take = {"kind": "take", "shape": [4, 9], "arrays": {"places": places}}
    wanted = x.reshape(len(x), -1)[:, places]
    np.testing.assert_array_equal(run(x, *before, take, TO_FLOATS), wanted)
    part = {"kind": "slice", "start": [0] * 3, "stop": [2, 3, channels]}
    part["stop"][axis - 1] = 1
    broadcast = {"kind": "broadcast", "shape": [2, 3, channels]}
    index = tuple(slice(None, 1 if dim == axis else None) for dim in range(4))
    wanted = np.broadcast_to(x[index], x.shape)
    nodes = [*before, part | {"strides": [1, 1, 1]}, broadcast, TO_FLOATS]
    np.testing.assert_array_equal(run(x, *nodes), wanted)


def test_constant_norm_mean_and_matmul():
    x = quarters(4, 3, 5)
    value, channel = quarters(5, 2, seed=1), [quarters(5, seed=s) for s in (2, 3, 4)]
    constant = {"kind": "constant", "shape": [5, 2], "arrays": {"value": value}}
    product = {"kind": "matmul", "inputs": [0, 1]}
    np.testing.assert_array_equal(run(x, constant, product), x @ value)
    arrays = dict(zip(("mean", "scale", "bias"), channel, strict=True))
    norm = run(x, {"kind": "norm", "arrays": arrays})
    np.testing.assert_array_equal(norm, (x - channel[0]) * channel[1] + channel[2])
    reciprocal = np.float32(1) / np.float32(3)
    np.testing.assert_array_equal(run(x, {"kind": "mean"}), x.sum(1) * reciprocal)


def windows(x, window, strides, padding, dilation, fill):
    """The values in each window: `[N, *out, taps, C]`."""
    pads = [(0, 0), *padding, (0, 0)]
    x = np.pad(x, pads, constant_values=fill)
    axes = range(1, x.ndim - 1)
    sizes = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, sizes, tuple(axes))
    rank = len(window)
    view = view[(slice(None), *(slice(None, None, s) for s in strides))]
    view = view[(..., *(slice(None, None, d) for d in dilation))]
    view = np.moveaxis(view, rank + 1, -1)  # the channels last
    return view.reshape(*view.shape[: rank + 1], -1, x.shape[-1])


GEOMETRIES = [
    {"window": [3], "strides": [2], "padding": [[2, 1]], "dilation": [2]},
    {
        "window": [3, 2],
        "strides": [1, 2],
        "padding": [[1, 2], [0, 1]],
        "dilation": [1, 2],
    },
    {"window": [1, 1], "strides": [2, 1], "padding": [[0, 0]] * 2, "dilation": [1, 1]},
    {
        "window": [2, 3, 2],
        "strides": [2, 1, 1],
        "padding": [[1, 0], [1, 1], [0, 1]],
        "dilation": [1, 1, 2],
    },
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize(
    ("product", "epilogue"),
    [
        *itertools.product(["real", "binary"], ["affine", "affine_relu", "threshold"]),
        *itertools.product(["scaled"], ["affine", "affine_relu"]),
    ],
)
def test_convolutions(geometry, groups, product, epilogue):
    binary, scaled = product == "binary", product == "scaled"
    rank, c_in, c_out = len(geometry["window"]), 36, 30 if groups > 1 else 35
    x = (signs if binary else quarters)(2, *(7, 5, 4)[:rank], c_in)
    shape = (*geometry["window"], c_in // groups, c_out)
    kernel = (signs if binary else quarters)(*shape, seed=1)
    patches = windows(x, **geometry, fill=0)
    group_features = c_out // groups
    parts = [
        np.einsum(
            "...tc,tco->...o",
            patches[..., g * (c_in // groups) : (g + 1) * (c_in // groups)],
            kernel.reshape(-1, c_in // groups, c_out)[
                ..., g * group_features : (g + 1) * group_features
            ],
        )
        for g in range(groups)
    ]
    sums = np.concatenate(parts, -1)
    bias, scale = quarters(c_out, seed=2), quarters(c_out, seed=3)
    node = {"kind": "binary_conv" if binary else "conv", "features": c_out}
    node |= {**geometry, "groups": groups, "epilogue": epilogue}
    node |= {"scaled": True} if scaled else {}
    arrays = {"kernel": packed(kernel) if binary else kernel}
    if epilogue == "threshold":
        flip = signs(c_out, seed=4)
        threshold = np.random.default_rng(5).integers(-9, 9, c_out)
        bound = math.prod(shape[:-1])
        threshold = np.clip(threshold, 1 - bound, bound)
        kind = np.int16 if binary else np.float32
        arrays |= {"threshold": threshold.astype(kind), "flip": packed(flip)}
        wanted = np.where(sums < threshold, -1, 1) * flip
    else:
        arrays |= {"bias": bias} | ({"scale": scale} if binary or scaled else {})
        wanted = sums * scale + bias if binary else sums + bias
        if scaled:
            arrays["shift"] = quarters(c_out, seed=4)
            wanted = wanted * scale + arrays["shift"]
        wanted = np.maximum(wanted, 0) if epilogue == "affine_relu" else wanted
    before = [to_bits(c_in)] if binary else []
    got = run(x, *before, node | {"arrays": arrays}, TO_FLOATS)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("channels", [3, 35, 64, 101])
def test_maxima_keep_nan_and_the_last_of_two_zeros(channels):
    x = quarters(2, 9, channels)
    x[0, 1, ::3], x[1, 2, ::2], x[1, 8] = np.nan, np.inf, -np.inf
    x[0, 3:, 1], x[0, 3:6:2, 1], x[0, 6:, 2], x[0, 8:, 2] = 0.0, -0.0, -0.0, 0.0
    entries = {"window": [3], "strides": [3], "padding": [[0, 0]]}
    got = run(x, {"kind": "pool", "function": "max", **entries})
    wanted = np.full((2, 3, channels), -np.inf, np.float32)
    for tap in range(3):
        row = x[:, tap::3]
        wanted = np.where((wanted > row) | np.isnan(wanted), wanted, row)
    np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32))


def elementwise(name, inputs, *constants):
    """A node of a function of these values and constants."""
    arrays = {f"constant{i}": c for i, c in enumerate(constants, len(inputs))}
    operands = [*range(len(inputs)), *[-1] * len(constants)]
    shapes = [[]] * len(inputs) + [list(c.shape) for c in constants]
    node = {"kind": "elementwise", "function": name, "inputs": inputs}
    return node | {"operands": operands, "shapes": shapes, "arrays": arrays}


@pytest.mark.parametrize("channels", [3, 16, 64, 200])
def test_pixelwise_operations_follow_part_by_part(channels):
    x, zero = quarters(3, 21, 19, channels), np.zeros(1, np.float32)
    scale, center = quarters(channels, seed=1), quarters(channels, seed=2)
    largest = {"kind": "reduce", "function": "max", "inputs": [0]}
    window = {"window": [3, 3], "strides": [1, 1], "padding": [[1, 1], [1, 1]]}
    norm = {"mean": center, "scale": scale, "bias": center}
    got = run(
        x,
        largest | {"axes": [3]},
        {"kind": "reshape", "shape": [21, 19, 1]},
        largest | {"axes": [1, 2]},
        {"kind": "reshape", "shape": [1, 1, channels]},
        elementwise("add", [0, 0]),  # 5
        # The pool still reads, at other pixels, what the sum could overwrite.
        {"kind": "pool", "function": "max", "inputs": [5], **window},
        elementwise("add", [5, 6]),
        elementwise("mul", [7], scale),
        elementwise("max", [8], zero),
        elementwise("sub", [9, 2]),  # a number per pixel
        elementwise("add", [9, 10]),  # 9 is not overwritten
        {"kind": "norm", "inputs": [11], "arrays": norm},
        elementwise("add", [12, 4]),  # a number per channel of an image
        elementwise("max", [13, 12]),
    )
    double = x + x
    wide = np.pad(double, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    pool = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2)).max((-2, -1))
    relu = np.maximum((double + pool) * scale, 0)
    last = (2 * relu - x.max(-1, keepdims=True) - center) * scale + center
    wanted = np.maximum(last + x.max((1, 2), keepdims=True), last)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("height", "features"), [(4, 36), (4, 300), (40, 36)])
def test_pixelwise_operations_follow_a_convolution(groups, height, features):
    x, bias = quarters(3, height, 7, 36), quarters(features, seed=1)
    kernel = quarters(3, 3, 36 // groups, features, seed=2)
    window = {"window": [3, 3], "strides": [1, 1], "padding": [[1, 1], [1, 1]]}
    arrays = {"kernel": kernel, "bias": bias}
    conv = {"kind": "conv", "groups": groups, "features": features, "arrays": arrays}
    got = run(
        x,
        conv | window | {"epilogue": "affine", "dilation": [1, 1], "scaled": False},
        elementwise("add", [1, 1]),
        elementwise("mul", [2], bias),
        to_bits(features),
        elementwise("add", [4, 3]),
    )
    wide = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    patches = np.lib.stride_tricks.sliding_window_view(wide, (3, 3), (1, 2))
    patches = patches.reshape(*x.shape[:3], groups, 36 // groups, 3, 3)
    by_group = kernel.reshape(3, 3, 36 // groups, groups, -1)
    sums = np.einsum("nhwgcij,ijcgo->nhwgo", patches, by_group, optimize=True)
    wanted = 2 * (sums.reshape(*x.shape[:3], features) + bias) * bias
    np.testing.assert_array_equal(got, wanted + np.where(wanted < 0, -1, 1))


@pytest.mark.parametrize(
    ("shape", "strides"), [((6, 1), [1, 2]), ((1, 1), [2, 2]), ((7, 1), [1, 1])]
)
def test_signs_of_sums_in_images_of_width_1(shape, strides):
    x, flip = quarters(5, *shape, 35), signs(35, seed=1)
    arrays = {"threshold": quarters(35, seed=2), "flip": packed(flip)}
    pool = {"kind": "sum_pool_bits", "window": [1, 1], "strides": strides}
    got = run(x, pool | {"padding": [[0, 0]] * 2, "arrays": arrays}, TO_FLOATS)
    wanted = x[:, :: strides[0], :: strides[1]]
    wanted = np.where(wanted < arrays["threshold"], -1, 1) * flip
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [35, 101])
def test_pools(geometry, channels):
    rank = len(geometry["window"])
    geometry = geometry | {"dilation": [1] * rank}
    geometry["padding"] = [
        [min(side, k - 1) for side in pads]
        for pads, k in zip(geometry["padding"], geometry["window"], strict=True)
    ]
    x = quarters(3, *(7, 5, 4)[:rank], channels)
    entries = {k: v for k, v in geometry.items() if k != "dilation"}
    for name, fill in (("sum", 0), ("max", -np.inf), ("min", np.inf)):
        wanted = getattr(np, name)(windows(x, **geometry, fill=fill), -2)
        got = run(x, {"kind": "pool", "function": name, **entries})
        np.testing.assert_array_equal(got, wanted)
    flip = signs(channels, seed=1)
    arrays = {"flip": packed(flip)}
    pool = {"kind": "max_pool_bits", **entries, "arrays": arrays}
    x = signs(3, *(7, 5, 4)[:rank], channels)
    largest, least = (
        f(windows(x, **geometry, fill=o), -2) for f, o in ((np.max, -1), (np.min, 1))
    )
    got = run(x, to_bits(channels), pool, TO_FLOATS)
    np.testing.assert_array_equal(got, np.where(flip < 0, least, largest))
    if rank == 2:
        arrays |= {"threshold": quarters(channels, seed=2)}
        node = {"kind": "sum_pool_bits", **entries, "arrays": arrays}
        sums = windows(quarters(3, 7, 5, channels), **geometry, fill=0).sum(-2)
        wanted = np.where(sums < arrays["threshold"], -1, 1) * flip
        got = run(quarters(3, 7, 5, channels), node, TO_FLOATS)
        np.testing.assert_array_equal(got, wanted)
