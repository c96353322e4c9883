import math

import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop

from xnor_jax.models import VGGSmall

# By hand, from the table.
WIDTHS = (128, 128, 256, 256, 512, 512)
BLOCKS = [f"block{number}" for number in range(2, 7)]
SHAPES = {
    "conv1/kernel": (3, 3, 3, 128),
    **{
        f"{name}/layer/kernel": (3, 3, before, after)
        for name, before, after in zip(BLOCKS, WIDTHS, WIDTHS[1:], strict=False)
    },
    **{
        f"{name}/norm/{p}": (before,)
        for name, before in zip(BLOCKS, WIDTHS, strict=False)
        for p in ("scale", "bias")
    },
    "norm7/scale": (512,),
    "norm7/bias": (512,),
    "dense7/kernel": (8192, 10),
    "dense7/bias": (10,),
}


class Table(oracles.Table):
    epsilon = 1e-5

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = self.conv("conv1", x, 1, 1)
        for name in BLOCKS:
            x = self.signed(f"{name}/layer", self.norm(f"{name}/norm", x))
            x = x if self.binary else np.maximum(x, 0)
            if name in ("block2", "block4", "block6"):
                x = loop.max_pool(x, 2, 2)
        x = np.clip(self.norm("norm7", x), -1, 1).reshape(len(x), -1)
        return x @ self.values["dense7/kernel"] + self.values["dense7/bias"]


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(VGGSmall)) == SHAPES
    # As many as ReCU's, without its two learned scales per convolution.
    assert sum(map(math.prod, SHAPES.values())) == 4_660_106


def test_output_shapes_match_the_table():
    model = oracles.abstract(VGGSmall)
    assert oracles.out_shape(model.block2, 2, 32, 32, 128) == (2, 32, 32, 128)
    assert oracles.out_shape(model.block5, 2, 8, 8, 256) == (2, 8, 8, 512)
    assert oracles.out_shape(model, 2, 32, 32, 3) == (2, 10)


def test_almost_all_macs_are_binary():
    binary, real = oracles.macs(oracles.abstract(VGGSmall), 32, 32, 3)
    sizes = (32, 16, 16, 8, 8)
    widths = zip(WIDTHS, WIDTHS[1:], sizes, strict=False)
    assert binary == sum(9 * a * b * size**2 for a, b, size in widths) == 603_979_776
    assert real == 27 * 128 * 32**2 + 81_920


def test_inner_kernels_are_the_blocks():
    inner = oracles.inner_kernels(oracles.abstract(VGGSmall))
    assert inner == [f"{name}/layer/kernel" for name in BLOCKS]


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_logits_match_loops(binary: bool):
    # Not square, with odd sizes inside.
    shape = (13, 9, 3)
    oracles.check_evaluation(Table, VGGSmall, shape, binary=binary, tolerance=1e-7)


def test_images_too_small_for_the_pools_are_refused():
    with pytest.raises(ValueError, match="VGGSmall: image_shape: .* at least 8×8"):
        oracles.abstract(VGGSmall, image_shape=(8, 7, 3))
