import math

import chex
import jax
import jax.numpy as jnp
import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx

from xnor_jax.models import NIN

# By hand, from the table of the specification.
KERNELS = {
    "conv1": (5, 5, 3, 192),
    "block2/layer": (1, 1, 192, 160),
    "block3/layer": (1, 1, 160, 96),
    "block4/layer": (5, 5, 96, 192),
    "block5/layer": (1, 1, 192, 192),
    "block6/layer": (1, 1, 192, 192),
    "block7/layer": (3, 3, 192, 192),
    "block8/layer": (1, 1, 192, 192),
    "conv9": (1, 1, 192, 10),
}
BLOCKS = [name.split("/")[0] for name in KERNELS if name.startswith("block")]
NORMS = {f"{name}/norm": KERNELS[f"{name}/layer"][2:3] for name in BLOCKS}
SHAPES = {
    **{f"{name}/kernel": shape for name, shape in KERNELS.items()},
    **{f"{name}/bias": shape[3:] for name, shape in KERNELS.items()},
    **{f"{name}/scale": shape for name, shape in NORMS.items()},
    **{f"{name}/bias": shape for name, shape in NORMS.items()},
}


class Table(oracles.Table):
    def __call__(self, x: np.ndarray) -> np.ndarray:
        pad1 = ((1, 1), (1, 1))
        x = np.maximum(self.norm("norm1", self.real("conv1", x, 2)), 0)
        x = self.block("block3", self.block("block2", x))
        x = loop.max_pool(x, 3, 2, pad1)
        x = self.block("block6", self.block("block5", self.block("block4", x, 2)))
        x = loop.average_pool(x, 3, 2, pad1)
        x = self.block("block8", self.block("block7", x, 1))
        x = self.real("conv9", self.norm("norm9", x))
        return np.maximum(x, 0).mean((1, 2))


@pytest.fixture(scope="module")
def model() -> NIN:
    # The default generator takes twice as long to compile.
    return NIN(rngs=nnx.Rngs(jax.random.key(0, impl="rbg")))


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(NIN)) == SHAPES
    assert sum(map(math.prod, SHAPES.values())) == 969_418


def test_output_shapes_match_the_table():
    model = oracles.abstract(NIN)
    assert oracles.out_shape(model.conv1, 7, 32, 32, 3) == (7, 32, 32, 192)
    assert oracles.out_shape(model.block3, 7, 32, 32, 160) == (7, 32, 32, 96)
    assert oracles.out_shape(model.block4, 7, 16, 16, 96) == (7, 16, 16, 192)
    assert oracles.out_shape(model.block7, 7, 8, 8, 192) == (7, 8, 8, 192)
    assert oracles.out_shape(model.conv9, 7, 8, 8, 192) == (7, 8, 8, 10)


@pytest.mark.parametrize("binary", [True, False])
def test_logits_match_loops(binary: bool):
    # Not square, with odd sizes inside: 10×8, 5×4, 3×2.
    oracles.check_evaluation(Table, NIN, (10, 8, 3), binary=binary)


def test_inner_kernels_are_the_seven_blocks():
    inner = oracles.inner_kernels(oracles.abstract(NIN))
    assert inner == [f"{name}/layer/kernel" for name in BLOCKS]


def test_norms_follow_the_reference():
    found = oracles.norms(oracles.abstract(NIN))
    assert sorted(found) == sorted([*NORMS, "norm1", "norm9"])
    for name, norm in found.items():
        assert (norm.epsilon, norm.momentum) == (1e-4, 0.9)
        assert (norm.use_scale, norm.use_bias) == (name in NORMS,) * 2


def test_dropout_is_in_the_wide_blocks():
    def rates(model):
        dropouts = {name: getattr(model, name).layer.dropout for name in BLOCKS}
        return {name: d.rate for name, d in dropouts.items() if d is not None}

    assert rates(oracles.abstract(NIN)) == {"block4": 0.5, "block7": 0.5}
    assert rates(oracles.abstract(NIN, dropout=0.1)) == {"block4": 0.1, "block7": 0.1}


def test_initial_kernel_deviation_is_0_05(model: NIN):
    params = oracles.flat(nnx.state(model, nnx.Param))
    for name, shape in SHAPES.items():
        value = np.asarray(params[name], np.float64)
        if name.endswith("kernel"):
            error = 0.05 / math.sqrt(value.size)
            assert abs(value.std() - 0.05) < 5 * error / math.sqrt(2), name
            assert abs(value.mean()) < 5 * error, name
            # A truncated normal of this deviation would end at 2.3 deviations.
            assert np.abs(value).max() > 3 * 0.05 or value.size < 3000, name
        else:
            expected = np.ones(shape) if name.endswith("scale") else np.zeros(shape)
            np.testing.assert_array_equal(value, expected, name)
    same_shape = [
        params[f"{name}/layer/kernel"] for name in ("block5", "block6", "block8")
    ]
    assert len({float(kernel[0, 0, 0, 0]) for kernel in same_shape}) == 3


def test_float_twin_has_the_same_parameters():
    twins = [oracles.abstract(NIN, binary=binary) for binary in (True, False)]
    states = [nnx.state(twin, nnx.Param) for twin in twins]
    chex.assert_trees_all_equal_structs(*states)
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)


@pytest.mark.parametrize(
    ("image_shape", "classes"),
    [((32, 32, 3), 10), ((28, 28, 1), 47), ((33, 47, 4), 3), ((1, 1, 3), 2)],
)
def test_other_image_shapes_and_classes(image_shape, classes):
    model = oracles.abstract(NIN, image_shape=image_shape, classes=classes)
    assert oracles.out_shape(model, 2, *image_shape) == (2, classes)


def test_evaluation_is_deterministic_and_keeps_state(model: NIN):
    model.eval()
    before = jax.tree.map(np.asarray, nnx.state(model, (nnx.Param, nnx.BatchStat)))
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, 4, 4, 3)))
    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(call(model, x), call(model, x))
    after = nnx.state(model, (nnx.Param, nnx.BatchStat))
    chex.assert_trees_all_equal(after, before)
