"""Benchmarks that no other test runs: the GPU scripts and the scaling model."""

import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path

import jax
import model_oracles as oracles
import numpy as np
import pytest

from xnor_jax import models

BENCHMARKS = Path(__file__).parent.parent / "experiments" / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def scaling():
    return importlib.import_module("scaling")


@pytest.mark.parametrize("name", ["gpu_step", "gpu_packed"])
def test_gpu_benchmarks_exit_without_a_gpu(monkeypatch, name):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one here")
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="expected a GPU that JAX can use, found cpu"):
        importlib.import_module(name).main()


def test_paper_layer_implementations_agree_in_jax(monkeypatch):
    script = importlib.import_module("paper_layer")
    size, channels = 5, 40
    monkeypatch.setattr(script, "SIZE", size)
    monkeypatch.setattr(script, "CHANNELS", channels)
    rng = np.random.default_rng(0)
    x = rng.choice(np.float32([-1, 1]), (2, size, size, channels))
    kernel = rng.choice(np.float32([-1, 1]), (3, 3, channels, channels))
    scale = rng.uniform(0.01, 0.1, channels).astype(np.float32)
    sides = script.jax_sides(x, kernel, scale)
    expected = np.asarray(sides.pop(script.OURS)())
    assert expected.shape == x.shape and len(sides) == 3
    for name, side in sides.items():
        y = np.asarray(side())
        if "channels first" in name:
            y = y.transpose(0, 2, 3, 1)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_gpu_packed_runs_with_tiny_sizes(monkeypatch, capsys):
    options = ["--tiny", "--rounds", "1", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", ["gpu_packed", *options])
    importlib.import_module("gpu_packed").main()
    out = capsys.readouterr().out
    assert "no GPU: these figures say only that the script runs" in out
    for row in ("| tiny | 2 |", "| LeNet5, packed | 2 |"):
        (line,) = (line for line in out.splitlines() if line.startswith(row))
        cells = [cell.strip(" *") for cell in line.split("|")[3:-1]]
        assert len(cells) == 4
        assert all(float(cell) > 0 for cell in cells)


@pytest.mark.slow
def test_gpu_step_runs_with_tiny_sizes(monkeypatch, capsys):
    pytest.importorskip("torch", reason="PyTorch is the optional extra `experiments`")
    # The other network takes a minute to compile.
    options = ["--tiny", "--rounds", "1", "--only", "NIN"]
    monkeypatch.setattr(sys, "argv", ["gpu_step", *options])
    importlib.import_module("gpu_step").main()
    out = capsys.readouterr().out
    assert "no GPU: these figures say only that the script runs" in out
    for name in ("| xnor_jax, float32 |", "| xnor_jax, bfloat16 |"):
        assert out.count(name) == 2
    assert out.count("| PyTorch |") == 1
    assert "an epoch of 8 images" in out


@pytest.mark.slow
def test_gpu_step_flops_match_the_scaling_model(scaling):
    step = importlib.import_module("gpu_step")
    nin = scaling.nin()
    counted = step.flops(step.CASES[0]) / 128
    # The script also counts other operations, and omits taps outside the image.
    assert 0.9 < counted / nin.flops < 1.1


@pytest.mark.parametrize(("name", "model"), [("nin", "NIN"), ("resnet18", "ResNet18")])
def test_scaling_model_matches_parameters_and_norms(scaling, name, model):
    network = getattr(scaling, name)()
    abstract = oracles.abstract(getattr(models, model))
    shapes = oracles.param_shapes(abstract)
    assert network.parameters == sum(map(math.prod, shapes.values()))
    norms = oracles.norms(abstract).values()
    assert sorted(network.norms) == sorted(norm.num_features for norm in norms)
    kernels = sorted(math.prod(s) for n, s in shapes.items() if n.endswith("kernel"))
    products = sorted(p.window**2 * p.before * p.after for p in network.products)
    assert products == kernels


def test_torch_resnet18_matches_parameter_shapes():
    pytest.importorskip("torch", reason="PyTorch is the optional extra `experiments`")
    net = importlib.import_module("torch_reference").ResNet18()

    def sizes(shapes):
        # PyTorch has [C_out, C_in, kh, kw], this library [kh, kw, C_in, C_out].
        return sorted(tuple(sorted(shape)) for shape in shapes)

    shapes = oracles.param_shapes(oracles.abstract(models.ResNet18))
    assert sizes(p.shape for p in net.parameters()) == sizes(shapes.values())
    assert len(net.inner_kernels()) == 16
    assert len(net.norm_scales()) == 20


def test_all_reduce_times_match_textbook_formulas(scaling):
    node = scaling.H100
    assert node.large(1, 1e9) == node.small(1) == 0
    ring = node.large(8, 8e9) - node.small(8)
    np.testing.assert_allclose(ring, 2 * 7 / 8 * 8e9 / 450e9)
    # Many nodes: the ring's time, plus twice an eighth over each device's own link.
    many = node.large(8 * 2**20, 8e9) - node.small(8 * 2**20)
    np.testing.assert_allclose(many, ring + 2 * 1e9 / 50e9, rtol=1e-5)
    assert node.small(16) - node.small(8) == pytest.approx(2 * node.far)


def test_scaling_page_contains_the_printed_tables(scaling, capsys):
    scaling.main()
    tables = capsys.readouterr().out
    page = (BENCHMARKS / "SCALING.md").read_text()
    for line in filter(None, tables.splitlines()):
        assert line in page, line


def test_gpu_compile_parses_hlo_and_requires_the_plugin(monkeypatch):
    script = importlib.import_module("gpu_compile")
    backward = (
        'metadata={op_name="jit(step)/transpose(jvp(block4))/conv_general_dilated"}'
    )
    text = f"""
%fused (parameter_0: bf16[8,192], parameter_1: bf16[192,160]) -> f32[8,160] {{
  ROOT %dot.1 = f32[8,160]{{1,0}} dot(%parameter_0, %parameter_1), \
metadata={{op_name="jit(step)/jvp(block2)/jit(conv)/dot_general"}}
}}
  %a = s8[8,8]{{1,0}} parameter(0)
  %conv.2 = (s32[8,8]{{1,0}}, u8[0]) custom-call(%a, %a), \
custom_call_target="__cudnn$convBackwardFilter", {backward}
  %sorted = s8[8,8]{{1,0}} custom-call(%a, %a), custom_call_target="Sort", {backward}
"""
    assert [*script.products(text)] == [
        (False, "XLA's own, Triton", "bf16 · bf16", "f32", "block2"),
        (True, "cuDNN", "s8 · s8", "s32", "block4"),
    ]
    if importlib.util.find_spec("jax_plugins") is None:
        monkeypatch.setattr(sys, "argv", ["gpu_compile", "--tiny"])
        monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
        with pytest.raises(SystemExit, match=r"needs JAX's plugin, pip install 'jax\["):
            script.main()
