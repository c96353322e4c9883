import math

import model_oracles as oracles
import numpy as np
import pytest

from xnor_jax.models import ResNet20

# By hand, from the table: channels into and out of each block.
WIDTHS = [16] * 7 + [32] * 6 + [64] * 6
BLOCKS = [f"blocks/{number}" for number in range(18)]
WIDER = ("blocks/6", "blocks/12")


def shapes() -> dict[str, tuple[int, ...]]:
    found = {"conv1/kernel": (3, 3, 3, 16), "norm1/scale": (16,), "norm1/bias": (16,)}
    for name, before, after in zip(BLOCKS, WIDTHS, WIDTHS[1:], strict=False):
        found[f"{name}/conv/kernel"] = (3, 3, before, after)
        norms = [f"{name}/norm"]
        if name in WIDER:
            found[f"{name}/shortcut/conv/kernel"] = (1, 1, before, after)
            norms.append(f"{name}/shortcut/norm")
        per_channel = [f"{norm}/{p}" for norm in norms for p in ("scale", "bias")]
        per_channel += [f"{name}/activation/{p}" for p in ("gamma", "zeta", "slope")]
        found |= dict.fromkeys(per_channel, (after,))
    return {**found, "dense20/kernel": (64, 10), "dense20/bias": (10,)}


class Table(oracles.Table):
    epsilon = 1e-5

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = self.norm("norm1", self.conv("conv1", x, 1, 1))
        for name in BLOCKS:
            x = self.bireal(name, x)
        x = x.mean((1, 2))
        return x @ self.values["dense20/kernel"] + self.values["dense20/bias"]


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(ResNet20)) == shapes()
    # He's network has 269,722; the shortcuts have 2,752 more, the activations 2,016.
    assert sum(map(math.prod, shapes().values())) == 269_722 + 2_752 + 2_016


def test_output_shapes_match_the_table():
    model = oracles.abstract(ResNet20)
    assert oracles.out_shape(model.conv1, 2, 32, 32, 3) == (2, 32, 32, 16)
    assert oracles.out_shape(model.blocks[6], 2, 32, 32, 16) == (2, 16, 16, 32)
    assert oracles.out_shape(model.blocks[12], 2, 16, 16, 32) == (2, 8, 8, 64)
    assert oracles.out_shape(model, 2, 32, 32, 3) == (2, 10)


def test_almost_all_macs_are_binary():
    # He's 40.6 million, except for the shortcuts' 1×1 convolutions.
    binary, real = oracles.macs(oracles.abstract(ResNet20), 32, 32, 3)
    assert binary == 6 * 2304 * 1024 + (4608 + 5 * 9216) * 256 + (
        (18432 + 5 * 36864) * 64
    )
    assert real == 432 * 1024 + 512 * 256 + 2048 * 64 + 640


def test_inner_kernels_are_the_blocks_without_shortcuts():
    model = oracles.abstract(ResNet20)
    inner = oracles.inner_kernels(model)
    assert sorted(inner) == sorted(f"{name}/conv/kernel" for name in BLOCKS)
    assert {block.conv.surrogate for block in model.blocks} == {"approx"}


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_logits_match_loops(binary: bool):
    # Not square, with odd sizes inside: 9×6, 5×3, 3×2.
    shape = (9, 6, 3)
    oracles.check_evaluation(Table, ResNet20, shape, binary=binary, tolerance=1e-7)
