"""A network's float twin in PyTorch and ONNX Runtime.

The twin is built from the library's network, layer by layer, with its kernels;
`packed_networks.py` checks its results against the library's float model. ResNet-18 is
written out.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Compile in this process: a pool of compilers would take cores from the benchmark.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import onnxruntime as ort
import torch
from flax import nnx
from torch import nn

from xnor_jax.geometry import conv_geometry
from xnor_jax.nn import (
    AvgPool,
    BinaryConv,
    BinaryLinear,
    GlobalAveragePool,
    MaxPool,
    XnorBlock,
)


def twin(model: Any) -> nn.Module:
    """Build the library's float model (`binary=False`) in PyTorch, for NCHW images."""
    steps: list[nn.Module] = []
    shape = (1, *model.image_shape)
    x = np.zeros(shape, np.float32)
    for layer in model.layers():
        steps += _read(layer, x.shape)
        x = layer(x)
    net = nn.Sequential(*steps).eval()
    return net.requires_grad_(False)


def resnet18() -> nn.Module:
    """He et al.'s ResNet-18 (2015, Table 1), for 224×224 images; random weights."""
    torch.manual_seed(0)
    blocks = [
        _Residual(before, features, 1 + (before != features))
        for before, features in (
            *((64, 64), (64, 64), (64, 128), (128, 128)),
            *((128, 256), (256, 256), (256, 512), (512, 512)),
        )
    ]
    return (
        nn.Sequential(
            *_conv_norm(3, 64, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 1000),
        )
        .eval()
        .requires_grad_(False)
    )


def _conv_norm(before: int, features: int, size: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(before, features, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(features)]


class _Residual(nn.Module):
    """Two 3×3 convolutions, and a 1×1 convolution in the shortcut at stride 2."""

    def __init__(self, before: int, features: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *_conv_norm(before, features, 3, stride),
            nn.ReLU(inplace=True),
            *_conv_norm(features, features, 3, 1),
        )
        self.shortcut = nn.Sequential(
            *(_conv_norm(before, features, 1, stride) if stride > 1 else [])
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _read(layer: Any, shape: tuple[int, ...]) -> list[nn.Module]:
    match layer:
        case XnorBlock():
            flat = isinstance(layer.layer, BinaryLinear)
            product = (
                _dense(layer.layer, shape) if flat else [_conv(layer.layer, shape)]
            )
            relu = [nn.ReLU(inplace=True)] if layer.relu else []
            return [_norm(layer.norm), *product, *relu]
        case nnx.BatchNorm():
            return [_norm(layer)]
        case nnx.Conv():
            return [_conv(layer, shape)]
        case nnx.Linear():
            return _dense(layer, shape)
        case MaxPool() | AvgPool():
            geometry = layer.geometry(shape[1:-1])
            window, strides = geometry.window, geometry.strides
            before = tuple(pad[0] for pad in geometry.padding)
            if isinstance(layer, MaxPool):
                return [nn.MaxPool2d(window, strides, before)]
            return [nn.AvgPool2d(window, strides, before)]
        case GlobalAveragePool():
            return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        case _ if layer is nnx.relu:
            return [nn.ReLU(inplace=True)]
    raise TypeError(f"no twin of {layer}")


def _conv(layer: nnx.Conv | BinaryConv, shape: tuple[int, ...]) -> nn.Conv2d:
    kernel = np.asarray(layer.kernel[...])
    *window, channels, features = kernel.shape
    geometry = conv_geometry(
        "conv", shape[1:-1], window, strides=1, padding=layer.padding
    )
    before = tuple(pad[0] for pad in geometry.padding)
    conv = nn.Conv2d(channels, features, tuple(window), padding=before)
    _set(conv.weight, kernel.transpose(3, 2, 0, 1))
    _set(conv.bias, layer.bias[...])
    return conv


def _dense(layer: nnx.Linear | BinaryLinear, shape: tuple[int, ...]) -> list[nn.Module]:
    kernel = np.asarray(layer.kernel[...])
    features = kernel.shape[-1]
    # The library flattens (H, W, C), PyTorch (C, H, W).
    order = range(len(shape) - 1)
    back = np.roll(order, 1).tolist()
    rows = kernel.reshape(*shape[1:], features).transpose(*back, len(shape) - 1)
    dense = nn.Linear(kernel.shape[0], features)
    _set(dense.weight, rows.reshape(-1, features).T)
    _set(dense.bias, layer.bias[...])
    return [nn.Flatten(), dense] if len(shape) > 2 else [dense]


def _norm(layer: nnx.BatchNorm) -> nn.BatchNorm2d:
    affine = layer.scale is not None
    norm = nn.BatchNorm2d(layer.num_features, eps=layer.epsilon, affine=affine)
    _set(norm.running_mean, layer.mean[...])
    _set(norm.running_var, layer.var[...])
    if affine:
        _set(norm.weight, layer.scale[...])
        _set(norm.bias, layer.bias[...])
    return norm


@torch.no_grad()
def _set(tensor: torch.Tensor | None, values: Any) -> None:
    assert tensor is not None
    tensor.copy_(torch.tensor(np.array(values)))


def eager(net: nn.Module, images: np.ndarray, last: bool) -> Callable[[], np.ndarray]:
    """PyTorch in eager mode, with channels first or last in memory."""
    layout = torch.channels_last if last else torch.contiguous_format
    net = net.to(memory_format=layout)
    x = torch.tensor(images).to(memory_format=layout)

    @torch.inference_mode()
    def run() -> np.ndarray:
        return net(x).numpy()

    return run


def compiled(net: nn.Module, images: np.ndarray) -> Callable[[], np.ndarray]:
    """`torch.compile` with frozen weights, which it can store in its own layouts."""
    x = torch.tensor(images)
    fast = torch.compile(net, options={"freezing": True})

    @torch.no_grad()
    def run() -> np.ndarray:
        return fast(x).numpy()

    run()
    return run


def export(net: nn.Module, images: np.ndarray, path: Path) -> None:
    """Write the network as ONNX, for the batch size of `images`."""
    torch.onnx.export(
        net,
        (torch.tensor(images),),
        path,
        input_names=["images"],
        opset_version=17,
        dynamo=False,
    )


class _Calibration:
    """Random batches to calibrate the ranges of the activations."""

    def __init__(self, images: np.ndarray, batches: int):
        rng = np.random.default_rng(1)
        shape = (batches, *images.shape)
        self.left = iter(rng.standard_normal(shape, np.float32))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.left, None)
        return None if batch is None else {"images": batch}


def quantize(source: Path, target: Path, images: np.ndarray) -> None:
    """Static int8: 8-bit weights per channel, 8-bit activations, from random images."""
    from onnxruntime import quantization as q

    class Reader(_Calibration, q.CalibrationDataReader):
        pass

    prepared = source.with_suffix(".prepared.onnx")
    q.shape_inference.quant_pre_process(source, prepared)
    q.quantize_static(
        prepared,
        target,
        Reader(images, batches=max(1, 32 // len(images))),
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
    )


def session(path: Path, images: np.ndarray, threads: int) -> Callable[[], np.ndarray]:
    """ONNX Runtime with its CPU provider."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    run_on = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run() -> np.ndarray:
        return run_on.run(None, {"images": images})[0]

    return run
