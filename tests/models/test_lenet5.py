import math

import chex
import jax
import jax.numpy as jnp
import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx

from xnor_jax.models import LeNet5

# By hand, from the table of the specification.
SHAPES = {
    "conv1/kernel": (5, 5, 1, 20),
    "conv1/bias": (20,),
    "block2/norm/scale": (20,),
    "block2/norm/bias": (20,),
    "block2/layer/kernel": (5, 5, 20, 50),
    "block2/layer/bias": (50,),
    "block3/norm/scale": (50,),
    "block3/norm/bias": (50,),
    "block3/layer/kernel": (800, 500),
    "block3/layer/bias": (500,),
    "dense4/kernel": (500, 10),
    "dense4/bias": (10,),
}


class Table(oracles.Table):
    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = np.maximum(self.norm("norm1", self.real("conv1", x)), 0)
        x = loop.max_pool(x, 2, 2)
        x = loop.max_pool(self.block("block2", x), 2, 2)
        return self.real("dense4", self.block("block3", x))


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(LeNet5)) == SHAPES
    assert sum(map(math.prod, SHAPES.values())) == 431_220


def test_output_shapes_match_the_table():
    model = oracles.abstract(LeNet5)
    assert oracles.out_shape(model.conv1, 7, 28, 28, 1) == (7, 24, 24, 20)
    assert oracles.out_shape(model.block2, 7, 12, 12, 20) == (7, 8, 8, 50)
    assert oracles.out_shape(model.block3, 7, 4, 4, 50) == (7, 500)
    assert oracles.out_shape(model.dense4, 7, 500) == (7, 10)


@pytest.mark.parametrize(
    ("binary", "image_shape"),
    [(True, (28, 28, 1)), (True, (19, 17, 2)), (False, (28, 28, 1))],
)
def test_logits_match_loops(binary: bool, image_shape):
    oracles.check_evaluation(Table, LeNet5, image_shape, binary=binary)


def test_inner_kernels_are_the_two_blocks():
    assert oracles.inner_kernels(oracles.abstract(LeNet5)) == [
        "block2/layer/kernel",
        "block3/layer/kernel",
    ]


def test_norms_follow_the_reference():
    found = oracles.norms(oracles.abstract(LeNet5))
    assert sorted(found) == ["block2/norm", "block3/norm", "norm1"]
    for name, norm in found.items():
        assert (norm.epsilon, norm.momentum) == (1e-4, 0.9)
        assert (norm.use_scale, norm.use_bias) == (name != "norm1",) * 2


def test_float_twin_has_the_same_parameters():
    twins = [oracles.abstract(LeNet5, binary=binary) for binary in (True, False)]
    states = [nnx.state(twin, nnx.Param) for twin in twins]
    chex.assert_trees_all_equal_structs(*states)
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)


@pytest.mark.parametrize(
    ("image_shape", "classes", "dense"),
    [((28, 28, 1), 10, 800), ((32, 32, 3), 7, 1250), ((16, 21, 2), 3, 100)],
)
def test_other_image_shapes_and_classes(image_shape, classes, dense):
    model = oracles.abstract(LeNet5, image_shape=image_shape, classes=classes)
    assert model.block3.layer.kernel.shape == (dense, 500)
    assert oracles.out_shape(model, 5, *image_shape) == (5, classes)


@pytest.mark.parametrize("image_shape", [(15, 28, 1), (28, 15, 3), (8, 8, 1)])
def test_images_too_small_are_refused(image_shape):
    with pytest.raises(ValueError, match=rf"at least 16×16, got \({image_shape[0]}"):
        LeNet5(image_shape=image_shape, rngs=nnx.Rngs(0))


def test_images_of_unexpected_size_are_refused():
    with pytest.raises(
        ValueError, match=r"expected \[..., 800\], got shape \(2, 1250\)"
    ):
        oracles.out_shape(oracles.abstract(LeNet5), 2, 32, 32, 1)


def test_only_training_updates_batch_statistics():
    model = oracles.with_numbers(oracles.abstract(LeNet5, image_shape=(16, 16, 1)))
    before = jax.tree.map(np.asarray, nnx.state(model, (nnx.Param, nnx.BatchStat)))
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, 16, 16, 1)))
    call = nnx.jit(lambda model, x: model(x))
    np.testing.assert_array_equal(call(model, x), call(model, x))
    after = nnx.state(model, (nnx.Param, nnx.BatchStat))
    chex.assert_trees_all_equal(after, before)

    model.train()
    call(model, x)
    chex.assert_trees_all_equal(
        nnx.state(model, nnx.Param), nnx.filter_state(before, nnx.Param)
    )
    for norm in oracles.norms(model).values():
        assert (norm.mean[...] != 0).any() and (norm.var[...] != 1).all()
