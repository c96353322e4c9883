from functools import partial

import bit_oracles as oracle
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bit_oracles import Case
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xnor_jax import ops

BACKENDS = ("auto", *ops.available_backends())

# Too large for the random examples: passes in a loop, whole and partial panels.
LARGE = [
    Case((7, 6), (3, 3), (1, 1), (1, 1), "SAME", 1, 256, 96, 2),
    Case((9, 8), (7, 7), (2, 1), (1, 1), ((3, 2), (0, 5)), 1, 40, 33, 1),
    Case((5, 4), (2, 3), (1, 2), (2, 1), ((2, 1), (1, 3)), 4, 4 * 65, 4 * 40, 2),
    Case((30,), (9,), (2,), (3,), ((7, 0),), 1, 130, 3, 2),
    Case((4, 4, 3), (3, 2, 3), (1, 2, 1), (1, 1, 1), "SAME", 1, 96, 5, 1),
    Case((6, 6), (3, 3), (1, 1), (1, 1), "SAME", 24, 24, 48, 3),
    Case((3, 3), (1, 1), (2, 2), (1, 1), ((1, 1), (2, 0)), 1, 33, 65, 2),
    Case((2, 2), (2, 2), (1, 1), (1, 1), ((5, 5), (5, 5)), 1, 3, 4, 1),
]


def check(case: Case, backend: str):
    y = ops.binary_conv(*case.arrays(), backend=backend, **case.options)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, case.sums())


@pytest.mark.parametrize("backend", ops.available_backends())
def test_sums_match_the_oracle(backend):
    @hypothesis.given(oracle.cases((1, 2) if backend == "cpu" else (1, 2, 3)))
    def run(case):
        check(case, backend)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_of_large_filters_match_the_oracle(case, backend):
    if len(case.window) > 2 and backend == "cpu":
        pytest.skip("has two spatial axes")
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_replaced_by_their_signs(backend):
    x, kernel = LARGE[0].arrays()
    call = partial(ops.binary_conv, backend=backend, **LARGE[0].options)
    signs = call(oracle.sign(x).astype("f"), oracle.sign(kernel).astype("f"))
    np.testing.assert_array_equal(call(7 * x, kernel / 3), signs)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_floating_dtype_gives_the_same_integers(dtypes, backend):
    arrays = map(jnp.asarray, LARGE[2].arrays(), dtypes)
    with jax.numpy_dtype_promotion("strict"):
        y = ops.binary_conv(*arrays, backend=backend, **LARGE[2].options)
    np.testing.assert_array_equal(y, LARGE[2].sums())


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalar_strides_and_padding_are_accepted(backend):
    case = Case((6, 5), (3, 2), (2, 2), (1, 1), ((1, 1), (1, 1)), 1, 35, 4, 2)
    x, kernel = case.arrays()
    y = ops.binary_conv(x, kernel, strides=2, padding=1, backend=backend)
    np.testing.assert_array_equal(y, case.sums())
    y = ops.binary_conv(x, kernel, strides=2, padding=[1, (1, 1)], backend=backend)
    np.testing.assert_array_equal(y, case.sums())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_gives_an_empty_result(backend):
    x, kernel = jnp.ones((0, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
    y = ops.binary_conv(x, kernel, strides=1, padding="VALID", backend=backend)
    assert y.shape == (0, 3, 3, 4)
    assert y.dtype == jnp.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_images_kernels_or_both(backend):
    case = Case((5, 4), (3, 2), (1, 2), (1, 1), ((1, 0), (2, 1)), 2, 66, 34, 2)
    draws = [case._replace(seed=seed).arrays() for seed in range(3)]
    x, kernel = (np.stack(arrays) for arrays in zip(*draws, strict=True))
    call = partial(ops.binary_conv, backend=backend, **case.options)
    both = jax.vmap(call)(x, kernel)
    for axes, args in [((0, None), (x, kernel[0])), ((None, 0), (x[0], kernel))]:
        some = jax.vmap(call, axes)(*args)
        np.testing.assert_array_equal(some[0], both[0])
        expected = call(
            x[2] if axes[0] == 0 else x[0], kernel[2 if axes[1] == 0 else 0]
        )
        np.testing.assert_array_equal(some[2], expected)
    np.testing.assert_array_equal(both[1], case._replace(seed=1).sums())


@pytest.mark.parametrize("case", [LARGE[0], LARGE[3]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_shard_map_over_the_batch(case, backend):
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices")
    x, kernel = case.arrays()
    mesh = Mesh(np.array(devices), ("batch",))
    call = partial(ops.binary_conv, backend=backend, **case.options)
    sharded = jax.shard_map(
        call, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P("batch")
    )
    x = jax.device_put(x, NamedSharding(mesh, P("batch")))
    np.testing.assert_array_equal(jax.jit(sharded)(x, kernel), case.sums())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_call_compiles_nothing(backend, compilations):
    x, kernel = LARGE[6].arrays()
    call = jax.jit(partial(ops.binary_conv, backend=backend, **LARGE[6].options))
    call(x, kernel).block_until_ready()
    before = compilations()
    call(-x, kernel).block_until_ready()
    assert compilations() == before


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_raises(argument, backend):
    def loss(x, kernel):
        y = ops.binary_conv(x, kernel, strides=1, padding=0, backend=backend)
        return jnp.sum(y.astype(jnp.float32))

    with pytest.raises(TypeError, match="binary_conv: .* has no gradient.*xnor_jax.nn"):
        jax.grad(loss, argument)(jnp.ones((1, 3, 3, 2)), jnp.ones((3, 3, 2, 2)))


def test_gradient_of_an_outer_scale_is_allowed():
    x, kernel = LARGE[6].arrays()

    def loss(scale):
        y = ops.binary_conv(x, kernel, **LARGE[6].options)
        return jnp.sum(scale * y.astype(jnp.float32))

    assert jax.grad(loss)(2.0) == LARGE[6].sums().sum()


IMAGES, KERNEL = np.ones((2, 5, 5, 6), "f"), np.ones((3, 3, 6, 4), "f")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": IMAGES.astype(int)}, TypeError, "a floating point x, got int"),
        ({"kernel": KERNEL.astype(bool)}, TypeError, "floating point kernel, got bool"),
        ({"x": IMAGES[0]}, ValueError, "got (5, 5, 6)"),
        ({"kernel": KERNEL[0, 0]}, ValueError, "1 to 3 spatial axes"),
        ({"kernel": KERNEL[..., :5, :]}, ValueError, "6 input channels"),
        ({"kernel": KERNEL[..., :0]}, ValueError, "a non-empty kernel"),
        ({"groups": 4}, ValueError, "6 in, 4 out and 4 groups"),
        ({"groups": 0}, ValueError, "groups of 1 or more"),
        ({"groups": 2}, ValueError, "3 input channels (images of 6, groups 2), got 6"),
        ({"strides": 0}, ValueError, "strides of 1 or more"),
        ({"strides": (1, 1, 1)}, ValueError, "one for each of 2 spatial axes"),
        ({"dilation": (1,)}, ValueError, "dilation of 1 or more"),
        ({"dilation": 3}, ValueError, "spans (7, 7) over (5, 5); add padding"),
        ({"padding": -1}, ValueError, "a padding of 0 or more"),
        ({"padding": "EVEN"}, ValueError, "got 'EVEN'"),
        ({"padding": (1, 1, 1)}, ValueError, "expected 2 entries"),
        ({"x": IMAGES[:, :0]}, ValueError, "spatial sizes from 1 to"),
        (
            {"backend": "tpu"},
            ValueError,
            "unknown backend 'tpu'; expected one of auto, float, xla, gpu, pallas, cpu",
        ),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(change, error, message):
    arguments = {"x": IMAGES, "kernel": KERNEL, "strides": 1, "padding": "VALID"}
    with pytest.raises(error) as raised:
        ops.binary_conv(**(arguments | change))
    text = str(raised.value)
    assert text.startswith("binary_conv: ")
    assert message in text
    assert "\n" not in text
