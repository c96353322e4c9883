import math

import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx

from xnor_jax.models import BiRealNet18
from xnor_jax.models._bireal import BiRealBlock

# By hand, from the table: channels into and out of each block.
WIDTHS = [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
BLOCKS = [f"blocks/{number}" for number in range(16)]


def shapes() -> dict[str, tuple[int, ...]]:
    found = {"conv1/kernel": (7, 7, 3, 64), "norm1/scale": (64,), "norm1/bias": (64,)}
    for name, before, after in zip(BLOCKS, WIDTHS, WIDTHS[1:], strict=False):
        found[f"{name}/conv/kernel"] = (3, 3, before, after)
        norms = [f"{name}/norm"]
        if before != after:
            found[f"{name}/shortcut/conv/kernel"] = (1, 1, before, after)
            norms.append(f"{name}/shortcut/norm")
        found |= {f"{norm}/{p}": (after,) for norm in norms for p in ("scale", "bias")}
    return {**found, "dense18/kernel": (512, 1000), "dense18/bias": (1000,)}


class Table(oracles.Table):
    epsilon = 1e-5

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = self.norm("norm1", self.conv("conv1", x, 2, 3))
        x = loop.max_pool(x, 3, 2, ((1, 1), (1, 1)))
        for name in BLOCKS:
            x = self.bireal(name, x)
        x = x.mean((1, 2))
        return x @ self.values["dense18/kernel"] + self.values["dense18/bias"]


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(BiRealNet18)) == shapes()
    # As in He's ResNet-18 with shortcuts of type B.
    assert sum(map(math.prod, shapes().values())) == 11_689_512


def test_output_shapes_match_the_table():
    model = oracles.abstract(BiRealNet18)
    assert oracles.out_shape(model.conv1, 2, 224, 224, 3) == (2, 112, 112, 64)
    assert oracles.out_shape(model.blocks[4], 2, 56, 56, 64) == (2, 28, 28, 128)
    assert oracles.out_shape(model.blocks[12], 2, 14, 14, 256) == (2, 7, 7, 512)
    assert oracles.out_shape(model, 2, 224, 224, 3) == (2, 1000)


def test_macs_match_the_paper():
    # ReActNet's Table 3: 1.68e9 binary, 1.39e8 float.
    binary, real = oracles.macs(oracles.abstract(BiRealNet18), 224, 224, 3)
    assert f"{binary:.2e}" == "1.68e+09"
    stem, shortcuts = 9408 * 112**2, 3 * 128 * 64 * 28**2
    assert real == stem + shortcuts + 512_000
    assert abs(real / 1.39e8 - 1) < 0.01


def test_inner_kernels_are_the_blocks_without_shortcuts():
    inner = oracles.inner_kernels(oracles.abstract(BiRealNet18))
    assert sorted(inner) == sorted(f"{name}/conv/kernel" for name in BLOCKS)


@pytest.mark.parametrize(("channels", "strides"), [((4, 8), 1), ((4, 4), 3)])
def test_blocks_with_invalid_shortcuts_are_refused(channels, strides):
    with pytest.raises(ValueError, match=f"BiRealBlock: expected .*strides={strides}"):
        BiRealBlock(*channels, strides=strides, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_logits_match_loops(binary: bool):
    # Not square, with odd sizes inside.
    shape = (20, 12, 3)
    oracles.check_evaluation(Table, BiRealNet18, shape, binary=binary, tolerance=1e-7)
