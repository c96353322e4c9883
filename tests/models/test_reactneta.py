import math
from typing import Any

import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx

from xnor_jax.models import ReActNetA
from xnor_jax.models.reactneta import ReActBlock

# By hand, from the table: channels into and out of each block.
WIDTHS = (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
BLOCKS = [f"blocks/{number}" for number in range(13)]
HALVED = [f"blocks/{number}" for number in (1, 3, 5, 11)]


def shapes() -> dict[str, tuple[int, ...]]:
    found = {"conv1/kernel": (3, 3, 3, 32), "norm1/scale": (32,), "norm1/bias": (32,)}
    for name, before, after in zip(BLOCKS, WIDTHS, WIDTHS[1:], strict=False):
        halves = range(after // before)
        found[f"{name}/conv1/kernel"] = (3, 3, before, before)
        found |= {f"{name}/conv2/{i}/kernel": (1, 1, before, before) for i in halves}
        norms = [f"{name}/norm1", *(f"{name}/norm2/{i}" for i in halves)]
        found |= {f"{norm}/{p}": (before,) for norm in norms for p in ("scale", "bias")}
        found |= {f"{name}/sign{i}/beta": (before,) for i in (1, 2)}
        for activation, features in (("activation1", before), ("activation2", after)):
            for p in ("gamma", "zeta", "slope"):
                found[f"{name}/{activation}/{p}"] = (features,)
    return {**found, "dense28/kernel": (1024, 1000), "dense28/bias": (1000,)}


class Table(oracles.Table):
    epsilon = 1e-5

    def block(self, name: str, x: np.ndarray, pad: int = 0) -> np.ndarray:
        v, halved = self.values, name in HALVED
        y = self.signed(f"{name}/conv1", x - v[f"{name}/sign1/beta"], 1 + halved)
        if halved:
            after = tuple((0, size % 2) for size in x.shape[1:3])
            x = loop.average_pool(x, 2, 2, after)
        x = self.rprelu(f"{name}/activation1", self.norm(f"{name}/norm1", y) + x)
        halves = []
        for i in range(2):
            if f"{name}/conv2/{i}/kernel" in v:
                y = x - v[f"{name}/sign2/beta"]
                y = self.signed(f"{name}/conv2/{i}", y, pad=0)
                halves.append(self.norm(f"{name}/norm2/{i}", y) + x)
        return self.rprelu(f"{name}/activation2", np.concatenate(halves, -1))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = self.norm("norm1", self.conv("conv1", x, 2, 1))
        for name in BLOCKS:
            x = self.block(name, x)
        x = x.mean((1, 2))
        return x @ self.values["dense28/kernel"] + self.values["dense28/bias"]


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(ReActNetA)) == shapes()
    assert sum(map(math.prod, shapes().values())) == 29_343_592


@pytest.mark.parametrize("features", [2, 6, 12])
def test_blocks_must_keep_or_double_their_channels(features: int):
    options: dict[str, Any] = {
        "strides": 1,
        "surrogate": "ste",
        "binary": True,
        "backend": "float",
    }
    with pytest.raises(ValueError, match=f"expected 4 or 8 .*, got {features}"):
        ReActBlock(4, features, **options, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_output_shapes_match_the_table():
    model = oracles.abstract(ReActNetA)
    assert oracles.out_shape(model.conv1, 2, 224, 224, 3) == (2, 112, 112, 32)
    assert oracles.out_shape(model.blocks[0], 2, 112, 112, 32) == (2, 112, 112, 64)
    assert oracles.out_shape(model.blocks[5], 2, 28, 28, 256) == (2, 14, 14, 512)
    assert oracles.out_shape(model.blocks[12], 2, 7, 7, 1024) == (2, 7, 7, 1024)
    assert oracles.out_shape(model, 2, 224, 224, 3) == (2, 1000)


@pytest.mark.slow
def test_macs_match_the_paper():
    # Table 3: 4.82e9 binary, 0.12e8 float.
    binary, real = oracles.macs(oracles.abstract(ReActNetA), 224, 224, 3)
    assert f"{binary:.2e}" == "4.82e+09"
    assert real == 864 * 112**2 + 1_024_000
    assert f"{real / 1e8:.2f}" == "0.12"


@pytest.mark.slow
def test_inner_kernels_are_the_blocks():
    inner = oracles.inner_kernels(oracles.abstract(ReActNetA))
    names = [n for n in shapes() if n.startswith("blocks") and n.endswith("kernel")]
    assert sorted(inner) == sorted(names)
    assert len(inner) == 31


@pytest.mark.slow
# Not square, with odd sizes inside. The float twin's last BatchNorms need more than two
# pixels: otherwise they would amplify float64's rounding.
@pytest.mark.parametrize(
    ("binary", "shape"), [(True, (13, 10, 3)), (False, (45, 35, 3))]
)
def test_logits_match_loops(binary: bool, shape: tuple[int, int, int]):
    oracles.check_evaluation(Table, ReActNetA, shape, binary=binary, tolerance=1e-7)
