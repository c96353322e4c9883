import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import model_oracles as oracles
import numpy as np
import pytest
import reference_loop as loop
from flax import nnx

import xnor_jax as xnor
from xnor_jax import data, models
from xnor_jax.models import ResNet18
from xnor_jax.models.resnet18 import Residual
from xnor_jax.train import recipe, step

WIDTHS = (64, 64, 64, 128, 128, 256, 256, 512, 512)
RESIDUALS = [f"residual{number}" for number in range(2, 10)]
WIDER = ("residual4", "residual6", "residual8")


def shapes() -> dict[str, tuple[int, ...]]:
    """By hand, from the papers' table."""
    found = {"conv1/kernel": (7, 7, 3, 64), "norm1/scale": (64,), "norm1/bias": (64,)}
    for name, before, after in zip(RESIDUALS, WIDTHS, WIDTHS[1:], strict=False):
        for block, channels in (("block1", before), ("block2", after)):
            found[f"{name}/{block}/layer/kernel"] = (3, 3, channels, after)
            found[f"{name}/{block}/norm/scale"] = (channels,)
            found[f"{name}/{block}/norm/bias"] = (channels,)
        if before != after:
            found[f"{name}/shortcut/conv/kernel"] = (1, 1, before, after)
            found[f"{name}/shortcut/norm/scale"] = (after,)
            found[f"{name}/shortcut/norm/bias"] = (after,)
    return {**found, "dense10/kernel": (512, 1000), "dense10/bias": (1000,)}


class Table(oracles.Table):
    def convolve(self, name, x, kernel, stride, pad):
        return loop.conv(x, kernel, (stride,) * 2, ((pad, pad),) * 2, (1, 1))

    def inner(self, name, x, stride=1):
        x, kernel = self.norm(f"{name}/norm", x), self.values[f"{name}/layer/kernel"]
        if self.binary:
            x, kernel = loop.sign(x), loop.binarize(kernel)
        return self.convolve(name, x, kernel, stride, 1)

    def residual(self, name, x):
        stride = 2 if name in WIDER else 1
        y = np.maximum(self.inner(f"{name}/block1", x, stride), 0)
        y = self.inner(f"{name}/block2", y)
        if name in WIDER:
            kernel = self.values[f"{name}/shortcut/conv/kernel"]
            x = self.convolve(name, x, kernel, stride, 0)
            x = self.norm(f"{name}/shortcut/norm", x)
        return np.maximum(y + x, 0)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = self.convolve("conv1", x, self.values["conv1/kernel"], 2, 3)
        x = loop.max_pool(np.maximum(self.norm("norm1", x), 0), 3, 2, ((1, 1), (1, 1)))
        for name in RESIDUALS:
            x = self.residual(name, x)
        x = x.mean((1, 2))
        return x @ self.values["dense10/kernel"] + self.values["dense10/bias"]


def test_parameters_match_the_table():
    assert oracles.param_shapes(oracles.abstract(ResNet18)) == shapes()
    # He's network has 11,689,512: its BatchNorms follow the convolutions.
    assert sum(map(math.prod, shapes().values())) == 11_688_616


def test_output_shapes_match_the_table():
    model = oracles.abstract(ResNet18)
    assert oracles.out_shape(model.conv1, 2, 224, 224, 3) == (2, 112, 112, 64)
    assert oracles.out_shape(model.residual3, 2, 56, 56, 64) == (2, 56, 56, 64)
    assert oracles.out_shape(model.residual4, 2, 56, 56, 64) == (2, 28, 28, 128)
    assert oracles.out_shape(model.residual8, 2, 14, 14, 256) == (2, 7, 7, 512)
    assert oracles.out_shape(model, 2, 224, 224, 3) == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_logits_match_loops(binary: bool):
    # Not square, with odd sizes inside. BatchNorms of dead channels amplify rounding.
    shape = (20, 12, 3)
    oracles.check_evaluation(Table, ResNet18, shape, binary=binary, tolerance=1e-7)


def test_inner_kernels_are_the_blocks_without_shortcuts():
    inner = oracles.inner_kernels(oracles.abstract(ResNet18))
    names = [n for n in shapes() if "block" in n and n.endswith("kernel")]
    assert sorted(inner) == sorted(names)
    assert len(inner) == 16


def test_cifar_stem_keeps_the_spatial_size():
    model = oracles.abstract(models.MODELS["resnet18-cifar"])
    wide = {**shapes(), "conv1/kernel": (3, 3, 3, 64), "dense10/kernel": (512, 10)}
    assert oracles.param_shapes(model) == {**wide, "dense10/bias": (10,)}
    assert oracles.out_shape(model.conv1, 2, 32, 32, 3) == (2, 32, 32, 64)
    assert oracles.out_shape(model.residual8, 2, 8, 8, 256) == (2, 4, 4, 512)
    binary, real = oracles.macs(model, 32, 32, 3)
    stage = 4 * 36_864 * 32**2
    assert binary == stage + 3 * (stage - 18_432 * 32**2)
    assert real == 1_728 * 32**2 + 3 * 8_192 * 16**2 + 5_120
    with pytest.raises(ValueError, match='ResNet18: stem: expected "imagenet" or "c'):
        oracles.abstract(ResNet18, stem="mnist")


@pytest.mark.slow
def test_recipe_trains_and_lowers_to_bfloat16():
    fields = {"model": "resnet18", "batch_size": 4, "compute_dtype": "bfloat16"}
    trainer, state = step.create(
        dataclasses.replace(recipe.get("cifar10-nin"), **fields),
        data.SOURCES["cifar10"],
        image_shape=(8, 8, 3),
        classes=5,
        steps_per_epoch=2,
    )
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (8, 8, 8, 3), np.uint8))
    labels = jnp.asarray(rng.integers(0, 5, 8, np.int32))
    before = jax.tree.map(np.asarray, state.params)
    carry = state, step.zero_total(state)
    batches = np.arange(8).reshape(2, 4)
    args = 0, 2, images, labels, batches, jax.random.key(0)
    traced = step.make_train_steps(trainer).trace(carry, *args)
    state, (metrics, _) = traced.lower().compile()(carry, *args)
    assert math.isfinite(metrics.loss)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, state.params)
    assert all(jax.tree.leaves(changed))
    kernels = jax.tree.leaves(state.params)
    for kernel, inner in zip(kernels, jax.tree.leaves(trainer.inner), strict=True):
        if inner:
            np.testing.assert_allclose(kernel.mean(-2), 0, atol=1e-6)
    # On a GPU, binary layers' products are bfloat16, except the kernel's gradient.
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "xnor_jax_run" not in program
    narrow = r"stablehlo\.convolution.*xbf16>, tensor<\w*xbf16>\) -> tensor<\w*x(\w+)>"
    # In the forward pass, layers of one shape share a function.
    assert Counter(re.findall(narrow, program)) == {"f32": 7, "bf16": 16}


def test_residual_packs_its_blocks_but_not_its_shortcut():
    model = nnx.eval_shape(lambda: Residual(32, 40, strides=2, rngs=nnx.Rngs(0)))
    model.eval()
    model = oracles.with_numbers(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, 32)), jnp.float32)
    packed = xnor.pack(model, example=x)
    kinds = {row.name: row.kind for row in packed.report.rows}
    binary = [name for name, kind in kinds.items() if kind == "binary"]
    assert binary == ["block1/layer", "block2/layer"]
    y, expected = jax.jit(lambda x: (packed(x), model(x)))(x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
