"""Helpers for the networks' tests: abstract models and references in NumPy loops."""

from math import prod
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import reference_loop as loop
from flax import nnx

from xnor_jax import masks, nn


def abstract(network: Any, **options: Any) -> Any:
    """Build a network in evaluation mode, with shapes but no values."""
    model = nnx.eval_shape(lambda: network(**options, rngs=nnx.Rngs(0)))
    model.eval()
    return model


def with_numbers(model: Any) -> Any:
    """Set random parameters and initial statistics, without a compilation."""
    rng = np.random.default_rng(0)
    for kind, draw in [
        (nnx.Param, lambda path, leaf: rng.normal(size=leaf.shape) / 3),
        (nnx.BatchStat, lambda path, leaf: np.full(leaf.shape, "var" in str(path))),
    ]:
        drawn = jax.tree.map_with_path(draw, nnx.state(model, kind))
        nnx.update(model, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), drawn))
    return model


def out_shape(module: nnx.Module, *shape: int) -> tuple[int, ...]:
    graph, state = nnx.split(module)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, x).shape


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {masks.path_string(path): leaf for path, leaf in leaves}


def param_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    return {n: leaf.shape for n, leaf in flat(nnx.state(model, nnx.Param)).items()}


def inner_kernels(model: nnx.Module) -> list[str]:
    mask = flat(masks.inner_kernels(model))
    return [name for name, is_inner in mask.items() if is_inner]


def macs(model: nnx.Module, *image_shape: int) -> tuple[int, int]:
    """Count the binary and the float multiplications of one image's forward pass."""
    counts = {True: 0, False: 0}

    def counted(call):
        def count(layer, x, *args, **options):
            y = call(layer, x, *args, **options)
            counts[getattr(layer, "binary", False)] += y.size * prod(
                layer.kernel.shape[:-1]
            )
            return y

        return count

    with mock.patch.multiple(nn.BinaryConv, then=counted(nn.BinaryConv.then)):
        with mock.patch.multiple(nn.BinaryLinear, then=counted(nn.BinaryLinear.then)):
            with mock.patch.multiple(nn.Conv, __call__=counted(nn.Conv.__call__)):
                linear = counted(nnx.Linear.__call__)
                with mock.patch.multiple(nnx.Linear, __call__=linear):
                    out_shape(model, 1, *image_shape)
    return counts[True], counts[False]


def norms(model: nnx.Module) -> dict[str, nnx.BatchNorm]:
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }


def evaluate(
    model: nnx.Module, values: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    """Evaluate the network in float64, so that no sign depends on rounding."""
    # `rest` stays abstract: dropout's generators, which evaluation does not use.
    graph, state, rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    assert sorted(flat(state)) == sorted(values)
    with jax.enable_x64(True):
        state = jax.tree.map_with_path(
            lambda path, _: jnp.asarray(values[masks.path_string(path)]), state
        )
        # Compiling with optimizations takes longer than the one call.
        quick = {"xla_backend_optimization_level": 0}
        forward = jax.jit(
            lambda state, x: nnx.merge(graph, state, rest)(x), compiler_options=quick
        )
        return np.asarray(forward(state, jnp.asarray(x)))


class Table:
    """A network from its table in the specification, in float64 loops.

    A BatchNorm without statistics in `values` uses slightly changed statistics of the
    batch and records them in `noted`: the batch's own would give another result.

    Args:
      values: Parameters and statistics by path, such as `block2/norm/mean`.
      binary: False for the float twin.
    """

    epsilon = 1e-4

    def __init__(self, values: dict[str, np.ndarray], *, binary: bool):
        self.values = values
        self.binary = binary
        self.noted: dict[str, np.ndarray] = {}

    def __call__(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        v, axes = self.values, tuple(range(x.ndim - 1))
        self.noted[f"{name}/mean"] = x.mean(axes) + 0.1
        self.noted[f"{name}/var"] = x.var(axes) * 1.2
        mean = v.get(f"{name}/mean", self.noted[f"{name}/mean"])
        variance = v.get(f"{name}/var", self.noted[f"{name}/var"])
        gamma, beta = v.get(f"{name}/scale", 1.0), v.get(f"{name}/bias", 0.0)
        return loop.batch_norm(x, mean, variance, self.epsilon, gamma, beta)

    def layer(
        self, name: str, x: np.ndarray, kernel: np.ndarray, pad: int
    ) -> np.ndarray:
        """A convolution where the kernel has a window, else a dense layer."""
        if kernel.ndim == 4:
            y = loop.conv(x, kernel, (1, 1), ((pad, pad),) * 2, (1, 1))
        else:
            y = x.reshape(len(x), -1) @ kernel
        return y + self.values[f"{name}/bias"]

    def real(self, name: str, x: np.ndarray, pad: int = 0) -> np.ndarray:
        return self.layer(name, x, self.values[f"{name}/kernel"], pad)

    def block(self, name: str, x: np.ndarray, pad: int = 0) -> np.ndarray:
        x, kernel = self.norm(f"{name}/norm", x), self.values[f"{name}/layer/kernel"]
        if self.binary:
            x, kernel = loop.sign(x), loop.binarize(kernel)
        return np.maximum(self.layer(f"{name}/layer", x, kernel, pad), 0)

    def conv(self, name: str, x: np.ndarray, stride: int, pad: int) -> np.ndarray:
        """A real convolution without a bias."""
        kernel = self.values[f"{name}/kernel"]
        return loop.conv(x, kernel, (stride,) * 2, ((pad, pad),) * 2, (1, 1))

    def signed(self, name: str, x: np.ndarray, stride: int = 1, pad: int = 1):
        kernel = self.values[f"{name}/kernel"]
        if self.binary:
            x, kernel = loop.sign(x), loop.binarize(kernel)
        return loop.conv(x, kernel, (stride,) * 2, ((pad, pad),) * 2, (1, 1))

    def rprelu(self, name: str, x: np.ndarray) -> np.ndarray:
        parameters = ("gamma", "zeta", "slope")
        gamma, zeta, slope = (self.values[f"{name}/{p}"] for p in parameters)
        return np.maximum(x - gamma, 0) + slope * np.minimum(x - gamma, 0) + zeta

    def bireal(self, name: str, x: np.ndarray) -> np.ndarray:
        """Bi-Real Net's block; the names in `values` select its parts."""
        down = f"{name}/shortcut/conv/kernel" in self.values
        clipped = not self.binary and f"{name}/activation/slope" not in self.values
        y = np.clip(x, -1, 1) if clipped else x
        y = self.norm(f"{name}/norm", self.signed(f"{name}/conv", y, 1 + down))
        if down:
            after = tuple((0, size % 2) for size in x.shape[1:3])
            x = loop.average_pool(x, 2, 2, after)
            x = self.norm(
                f"{name}/shortcut/norm", self.conv(f"{name}/shortcut/conv", x, 1, 0)
            )
        y = y + x
        if f"{name}/activation/slope" in self.values:
            y = self.rprelu(f"{name}/activation", y)
        return y


def check_evaluation(
    table: type[Table],
    network: Any,
    image_shape: tuple[int, int, int],
    *,
    binary: bool,
    tolerance: float = 1e-9,
) -> None:
    """Compare the network with its table, on random parameters and statistics."""
    model = abstract(network, image_shape=image_shape, binary=binary)
    rng = np.random.default_rng(0)
    values = {n: 0.3 * rng.normal(size=s) for n, s in param_shapes(model).items()}
    x = rng.normal(size=(2, *image_shape))
    calibration = table(values, binary=binary)
    calibration(x)
    values |= calibration.noted
    expected = table(values, binary=binary)(x)
    assert (np.abs(expected) > 0).mean() > 0.2, "too little left to compare"
    np.testing.assert_allclose(
        evaluate(model, values, x), expected, rtol=tolerance, atol=tolerance
    )
