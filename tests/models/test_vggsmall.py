import math

import model_oracles as oracles
import pytest

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


def test_parameters_are_those_of_the_table():
    assert oracles.param_shapes(oracles.abstract(VGGSmall)) == SHAPES
    # As many as ReCU's, without the two learnt scales that it has a convolution.
    assert sum(map(math.prod, SHAPES.values())) == 4_660_106


def test_layers_have_the_tables_outputs():
    model = oracles.abstract(VGGSmall)
    assert oracles.out_shape(model.block2, 2, 32, 32, 128) == (2, 32, 32, 128)
    assert oracles.out_shape(model.block5, 2, 8, 8, 256) == (2, 8, 8, 512)
    assert oracles.out_shape(model, 2, 32, 32, 3) == (2, 10)


def test_almost_all_multiplications_are_of_signs():
    binary, real = oracles.macs(oracles.abstract(VGGSmall), 32, 32, 3)
    sizes = (32, 16, 16, 8, 8)
    widths = zip(WIDTHS, WIDTHS[1:], sizes, strict=False)
    assert binary == sum(9 * a * b * size**2 for a, b, size in widths) == 603_979_776
    assert real == 27 * 128 * 32**2 + 81_920


def test_inner_kernels_are_those_of_the_blocks():
    inner = oracles.inner_kernels(oracles.abstract(VGGSmall))
    assert inner == [f"{name}/layer/kernel" for name in BLOCKS]


def test_images_too_small_for_the_pools_are_refused():
    with pytest.raises(ValueError, match="VGGSmall: image_shape: .* at least 8×8"):
        oracles.abstract(VGGSmall, image_shape=(8, 7, 3))
