import math

import jax
import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx

from xnor_jax.models import AlexNet

# By hand, from the table of the specification.
KERNELS = {
    "conv1": (11, 11, 3, 96),
    "block2/layer": (5, 5, 96, 256),
    "block3/layer": (3, 3, 256, 384),
    "block4/layer": (3, 3, 384, 384),
    "block5/layer": (3, 3, 384, 256),
    "block6/layer": (9216, 4096),
    "block7/layer": (4096, 4096),
    "dense8": (4096, 1000),
}
BLOCKS = [name.split("/")[0] for name in KERNELS if name.startswith("block")]
NORMS = {
    "norm1": (96,),
    **{f"{name}/norm": KERNELS[f"{name}/layer"][-2:-1] for name in BLOCKS},
    "norm8": (4096,),
}
SHAPES = {
    **{f"{name}/kernel": shape for name, shape in KERNELS.items()},
    **{f"{name}/bias": shape[-1:] for name, shape in KERNELS.items()},
    **{
        f"{name}/{p}": shape for name, shape in NORMS.items() for p in ("scale", "bias")
    },
}


class Table(oracles.Table):
    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = self.conv("conv1", x, 4, 0) + self.values["conv1/bias"]
        x = loop.max_pool(np.maximum(self.norm("norm1", x), 0), 3, 2)
        x = loop.max_pool(self.block("block2", x, 2), 3, 2)
        for name in ("block3", "block4", "block5"):
            x = self.block(name, x, 1)
        x = loop.max_pool(x, 3, 2).reshape(len(x), -1)
        x = self.block("block7", self.block("block6", x))
        self.epsilon = 1e-3
        x = self.norm("norm8", x)
        self.epsilon = 1e-4
        return self.real("dense8", x)


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(AlexNet)) == SHAPES
    assert sum(map(math.prod, SHAPES.values())) == 62_415_592


def test_output_shapes_match_the_table():
    model = oracles.abstract(AlexNet)
    assert oracles.out_shape(model.conv1, 2, 227, 227, 3) == (2, 55, 55, 96)
    assert oracles.out_shape(model.block2, 2, 27, 27, 96) == (2, 27, 27, 256)
    assert oracles.out_shape(model.block5, 2, 13, 13, 384) == (2, 13, 13, 256)
    assert oracles.out_shape(model.block6, 2, 9216) == (2, 4096)
    assert oracles.out_shape(model, 2, 227, 227, 3) == (2, 1000)


def test_macs_are_counted_by_precision():
    binary, real = oracles.macs(oracles.abstract(AlexNet), 227, 227, 3)
    wide = 25 * 96 * 256 * 27**2
    narrow = 9 * (256 * 384 + 384 * 384 + 384 * 256) * 13**2
    assert binary == wide + narrow + 9216 * 4096 + 4096 * 4096
    assert real == 363 * 96 * 55**2 + 4096 * 1000


def test_inner_kernels_are_the_six_blocks():
    inner = oracles.inner_kernels(oracles.abstract(AlexNet))
    assert inner == [f"{name}/layer/kernel" for name in BLOCKS]


def test_norms_and_dropout_follow_the_reference():
    model = oracles.abstract(AlexNet)
    found = oracles.norms(model)
    assert sorted(found) == sorted(NORMS)
    for name, norm in found.items():
        assert norm.epsilon == (1e-3 if name == "norm8" else 1e-4)
        assert norm.momentum == 0.9
    rates = {name: getattr(model, name).layer.dropout for name in BLOCKS}
    assert {n: d.rate for n, d in rates.items() if d is not None} == {"block7": 0.5}
    assert model.dropout8.rate == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_logits_match_loops(binary: bool):
    # The smallest height, and a width whose last columns no window reaches.
    shape = (67, 70, 3)
    oracles.check_evaluation(Table, AlexNet, shape, binary=binary, tolerance=1e-7)


@pytest.mark.slow
def test_initial_kernel_deviation_is_two_over_fan_in():
    model = AlexNet(image_shape=(67, 67, 3), classes=30, rngs=nnx.Rngs(0))
    params = oracles.flat(nnx.state(model, nnx.Param))
    for name in KERNELS:
        value = np.asarray(jax.device_get(params[f"{name}/kernel"][...]))
        deviation = 2 / math.prod(value.shape[:-1])
        error = 5 * deviation / math.sqrt(2 * value.size)
        assert abs(value.std(dtype=np.float64) - deviation) < error, name


def test_images_too_small_for_the_pools_are_refused():
    with pytest.raises(ValueError, match="AlexNet: image_shape: .* at least 67×67"):
        oracles.abstract(AlexNet, image_shape=(66, 227, 3))
