"""XNOR-Net's arithmetic as NumPy float64 loops, with gradients by hand and no JAX.

An independent reference, written from the formulas alone. Images are
`[N, *spatial, C]`, kernels `[*window, C / groups, C_out]`.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

Pads = tuple[tuple[int, int], ...]


def sign(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def scale(kernel: np.ndarray) -> np.ndarray:
    return np.abs(kernel).mean(axis=tuple(range(kernel.ndim - 1)))


def binarize(kernel: np.ndarray) -> np.ndarray:
    return scale(kernel) * sign(kernel)


def project(kernel: np.ndarray) -> np.ndarray:
    return np.clip(kernel - kernel.mean(axis=-2, keepdims=True), -1, 1)


def corrected(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    return exact(w, g) * (1 - 1 / w.shape[-2]) * (w.size / w.shape[-1])


def paper(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    n = w.size / w.shape[-1]
    return g * (scale(w) * (np.abs(w) < 1) + 1 / n) * (1 - 1 / w.shape[-2]) * n


def exact(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    axes = tuple(range(w.ndim - 1))
    through_scale = sign(w) * (sign(w) * g).mean(axis=axes)
    return scale(w) * (np.abs(w) <= 1) * g + through_scale


def ste(w: np.ndarray, g: np.ndarray) -> np.ndarray:
    return g * (np.abs(w) <= 1)


RULES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "corrected": corrected,
    "paper": paper,
    "exact": exact,
    "ste": ste,
}


def same_pads(
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    strides: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Pads:
    """SAME padding: ⌈size / stride⌉ outputs; an odd zero goes after."""
    pads = []
    for size, k, s, d in zip(spatial, window, strides, dilation, strict=True):
        missing = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
        pads.append((missing // 2, missing - missing // 2))
    return tuple(pads)


def conv(
    x: np.ndarray,
    kernel: np.ndarray,
    strides: tuple[int, ...],
    pads: Pads,
    dilation: tuple[int, ...],
    groups: int = 1,
) -> np.ndarray:
    """A convolution; taps in the padding are skipped."""
    spatial, window = x.shape[1:-1], kernel.shape[:-2]
    sizes = [n + sum(p) for n, p in zip(spatial, pads, strict=True)]
    out = _out_shape(sizes, window, strides, dilation)
    y = np.zeros((len(x), *out, kernel.shape[-1]))
    for tap in product(*map(range, window)):
        places, targets = [], []
        for axis, t in enumerate(tap):
            meets = np.arange(out[axis]) * strides[axis] + t * dilation[axis]
            meets = meets - pads[axis][0]
            inside = (meets >= 0) & (meets < spatial[axis])
            places.append(meets[inside])
            targets.append(np.flatnonzero(inside))
        for inputs, outputs in _groups(x.shape[-1], kernel.shape[-1], groups):
            pixels = np.float64(x[..., inputs][np.ix_(range(len(x)), *places)])
            target = np.ix_(range(len(x)), *targets)
            y[..., outputs][target] += pixels @ np.float64(kernel[tap][:, outputs])
    return y


def conv_gradients(
    x: np.ndarray,
    kernel: np.ndarray,
    g: np.ndarray,
    strides: tuple[int, ...],
    pads: Pads,
    dilation: tuple[int, ...],
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of `(conv(x, kernel) · g).sum()` for `x` and `kernel`."""
    padded = _pad(x, pads)
    d_padded, d_kernel = np.zeros_like(padded), np.zeros(kernel.shape)
    for place, taps in _places(g.shape[1:-1], kernel.shape[:-2], strides, dilation):
        for inputs, outputs in _groups(padded.shape[-1], kernel.shape[-1], groups):
            window = (slice(None), *taps, inputs)
            patch, matrix = padded[window], kernel[..., outputs]
            at_place = g[(slice(None), *place, outputs)]
            d_padded[window] += np.tensordot(at_place, matrix, (-1, -1))
            d_kernel[..., outputs] += np.tensordot(patch, at_place, (0, 0))
    inside = (slice(b, b + n) for (b, _), n in zip(pads, x.shape[1:-1], strict=True))
    return d_padded[(slice(None), *inside)], d_kernel


def max_pool(
    x: np.ndarray, size: int, stride: int, pads: Pads = ((0, 0), (0, 0))
) -> np.ndarray:
    return _pool(np.max, -np.inf, x, size, stride, pads)


def average_pool(
    x: np.ndarray, size: int, stride: int, pads: Pads = ((0, 0), (0, 0))
) -> np.ndarray:
    """Average pooling; means include the padding's zeros."""
    return _pool(np.mean, 0.0, x, size, stride, pads)


def batch_norm(
    x: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
    gamma: np.ndarray | float = 1.0,
    beta: np.ndarray | float = 0.0,
) -> np.ndarray:
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def batch_norm_gradients(
    x: np.ndarray, epsilon: float, gamma: np.ndarray | float, g: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The gradients for `x`, γ and β, with the batch's mean and variance."""
    axes = tuple(range(x.ndim - 1))
    deviation = np.sqrt(x.var(axes) + epsilon)
    normal = (x - x.mean(axes)) / deviation
    d_normal = g * gamma
    d_x = d_normal - d_normal.mean(axes) - normal * (d_normal * normal).mean(axes)
    return d_x / deviation, (g * normal).sum(axes), g.sum(axes)


class Adam:
    """`torch.optim.Adam`: L2 decay is added to the gradient; ε is outside the root."""

    def __init__(self, learning_rate: float, weight_decay: float):
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.first: dict[str, Any] = {}
        self.second: dict[str, Any] = {}
        self.count = 0

    def step(self, params: dict[str, np.ndarray], grads: dict[str, np.ndarray]):
        self.count += 1
        for name, grad in grads.items():
            grad = grad + self.weight_decay * params[name]
            m = self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * grad
            v = 0.999 * self.second.get(name, 0.0) + 0.001 * grad**2
            self.second[name] = v
            m = m / (1 - 0.9**self.count)
            root = np.sqrt(v) / np.sqrt(1 - 0.999**self.count)
            params[name] = params[name] - self.learning_rate * m / (root + 1e-8)


class ReferenceNetwork:
    """A small network, and every part of the reference's training step.

    conv1 3×3 valid, real → BatchNorm without affine → ReLU → BatchNorm → sign → conv2
    3×3 pad 1, binary → ReLU → BatchNorm → sign → dense3, binary → ReLU → dense4, real.

    Attributes:
      params: The parameters by name, such as `conv2.kernel`; `step` updates them.
      means: The running means of `norm1`, `norm2`, `norm3`; momentum 0.1 in
        PyTorch's sense.
    """

    BINARY = ("conv2.kernel", "dense3.kernel")
    EPSILON = 1e-4

    def __init__(self, params: dict[str, np.ndarray], optimizer: Adam):
        self.params = {name: value.copy() for name, value in params.items()}
        self.optimizer = optimizer
        self.means: dict[str, Any] = {"norm1": 0.0, "norm2": 0.0, "norm3": 0.0}

    def prepare(self) -> dict[str, np.ndarray]:
        """Return params with centred, clamped kernels and BatchNorm scales ≥ 0.01."""
        prepared = dict(self.params)
        for name in self.BINARY:
            prepared[name] = project(prepared[name])
        for name in ("norm2.scale", "norm3.scale"):
            prepared[name] = np.maximum(prepared[name], 0.01)
        return prepared

    def step(self, x: np.ndarray, labels: np.ndarray) -> float:
        """Centre, clamp, save, binarize, forward, backward, restore, rule, Adam."""
        saved = self.prepare()
        binarized = {n: binarize(saved[n]) for n in self.BINARY}
        loss, grads = self.loss_and_gradients({**saved, **binarized}, x, labels)
        for name in self.BINARY:
            grads[name] = corrected(saved[name], grads[name])
        self.params = saved
        self.optimizer.step(self.params, grads)
        return loss

    def loss_and_gradients(
        self, p: dict[str, np.ndarray], x: np.ndarray, labels: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        valid = ((1, 1), ((0, 0), (0, 0)), (1, 1))
        pad1 = ((1, 1), ((1, 1), (1, 1)), (1, 1))
        count = len(x)

        conv1 = conv(x, p["conv1.kernel"], *valid) + p["conv1.bias"]
        norm1 = self._norm("norm1", conv1)
        block1 = np.maximum(norm1, 0)
        norm2 = self._norm("norm2", block1, p["norm2.scale"], p["norm2.bias"])
        conv2 = conv(sign(norm2), p["conv2.kernel"], *pad1) + p["conv2.bias"]
        block2 = np.maximum(conv2, 0)
        norm3 = self._norm("norm3", block2, p["norm3.scale"], p["norm3.bias"])
        flat = norm3.reshape(count, -1)
        dense3 = sign(flat) @ p["dense3.kernel"] + p["dense3.bias"]
        block3 = np.maximum(dense3, 0)
        logits = block3 @ p["dense4.kernel"] + p["dense4.bias"]

        shifted = logits - logits.max(axis=1, keepdims=True)
        log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        one_hot = np.eye(logits.shape[1])[labels]
        loss = -(one_hot * log_softmax).sum() / count

        grads: dict[str, np.ndarray] = {}
        d = (np.exp(log_softmax) - one_hot) / count
        grads["dense4.kernel"], grads["dense4.bias"] = block3.T @ d, d.sum(0)
        d = d @ p["dense4.kernel"].T * (dense3 > 0)
        grads["dense3.kernel"], grads["dense3.bias"] = sign(flat).T @ d, d.sum(0)
        d = d @ p["dense3.kernel"].T * (np.abs(flat) < 1)
        d, grads["norm3.scale"], grads["norm3.bias"] = batch_norm_gradients(
            block2, self.EPSILON, p["norm3.scale"], d.reshape(norm3.shape)
        )
        d = d * (conv2 > 0)
        grads["conv2.bias"] = d.sum((0, 1, 2))
        d, grads["conv2.kernel"] = conv_gradients(
            sign(norm2), p["conv2.kernel"], d, *pad1
        )
        d = d * (np.abs(norm2) < 1)
        d, grads["norm2.scale"], grads["norm2.bias"] = batch_norm_gradients(
            block1, self.EPSILON, p["norm2.scale"], d
        )
        d, _, _ = batch_norm_gradients(conv1, self.EPSILON, 1.0, d * (norm1 > 0))
        grads["conv1.bias"] = d.sum((0, 1, 2))
        _, grads["conv1.kernel"] = conv_gradients(x, p["conv1.kernel"], d, *valid)
        return float(loss), grads

    def _norm(
        self,
        name: str,
        x: np.ndarray,
        gamma: np.ndarray | float = 1.0,
        beta: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        axes = tuple(range(x.ndim - 1))
        mean, variance = x.mean(axes), x.var(axes)
        self.means[name] = 0.9 * self.means[name] + 0.1 * mean
        return batch_norm(x, mean, variance, self.EPSILON, gamma, beta)


def _pad(x: np.ndarray, pads: Pads, value: float = 0.0) -> np.ndarray:
    width = ((0, 0), *pads, (0, 0))
    return np.pad(np.asarray(x, np.float64), width, constant_values=value)


def _out_shape(spatial, window, strides, dilation) -> tuple[int, ...]:
    geometry = zip(spatial, window, strides, dilation, strict=True)
    return tuple(max(0, (n - (k - 1) * d - 1) // s + 1) for n, k, s, d in geometry)


def _places(
    out, window, strides, dilation
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield each output position and its slices of the padded input."""
    for place in product(*map(range, out)):
        geometry = zip(place, window, strides, dilation, strict=True)
        yield (
            place,
            tuple(slice(i * s, i * s + (k - 1) * d + 1, d) for i, k, s, d in geometry),
        )


def _groups(channels_in: int, channels_out: int, groups: int):
    size_in, size_out = channels_in // groups, channels_out // groups
    for group in range(groups):
        yield (
            slice(group * size_in, (group + 1) * size_in),
            slice(group * size_out, (group + 1) * size_out),
        )


def _pool(reduce, outside: float, x, size, stride, pads) -> np.ndarray:
    padded = _pad(x, pads, outside)
    window, strides, unit = (size, size), (stride, stride), (1, 1)
    out = _out_shape(padded.shape[1:-1], window, strides, unit)
    y = np.zeros((len(x), *out, x.shape[-1]))
    for place, taps in _places(out, window, strides, unit):
        values = padded[(slice(None), *taps)]
        y[(slice(None), *place)] = reduce(values, axis=(1, 2))
    return y
