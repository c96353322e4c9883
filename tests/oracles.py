"""The formulas in NumPy float64, one filter at a time, and random kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

RULES = ("corrected", "paper", "exact", "ste")
HALF = ("bfloat16", "float16")
DTYPES = ("float32", *HALF)
SHAPES = ((7, 3), (2, 1), (3, 5, 2), (3, 2, 5, 4), (2, 1, 2, 3, 3))  # each partly odd


def random_kernel(seed, shape, dtype="float32", magnitude=0.7):
    """Normal weights; up to half of them are ±0, ±1 and the neighbours of ±1."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(dtype)
    w = (magnitude * rng.normal(size=shape)).astype(dtype).ravel()
    eps = float(jnp.finfo(dtype).eps)
    points = np.array([0, 1, 1 - eps, 1 + eps])
    points = rng.permutation(np.concatenate([points, -points]))[: w.size // 2]
    w[rng.permutation(w.size)[: points.size]] = points.astype(dtype)
    return jnp.asarray(w.reshape(shape))


def random_array(seed, shape, dtype="float32"):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(dtype)))


def assert_close(actual, expected, *, size=0.0, name=""):
    """Check that `actual` is `expected` rounded to its dtype, summed in float32.

    Args:
      actual: The array to check.
      expected: The float64 oracle.
      size: The magnitude of terms that cancel; at least that of `expected` is used.
      name: The name in the message.
    """
    expected = np.asarray(expected)
    eps = float(jnp.finfo(actual.dtype).eps)
    single = float(jnp.finfo(jnp.float32).eps)
    work = min(eps, single)
    rtol = eps if eps > single else 16 * work
    least = float(jnp.finfo(actual.dtype).smallest_subnormal)
    atol = 16 * work * max(size, np.max(np.abs(expected), initial=0.0)) + least
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(
        f64(actual), expected, rtol=rtol, atol=atol, err_msg=name
    )


def assert_full_precision(function, *args):
    """Check that a GPU would compute the products of floats in float32, not in TF32."""
    program = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    lines = program.as_text().splitlines()
    ops = ("stablehlo.convolution", "stablehlo.dot_general")
    found = [line for line in lines if any(op in line for op in ops) and "f32" in line]
    assert found
    assert [line for line in found if "HIGHEST" not in line] == []


def f64(x):
    return np.asarray(x).astype(np.float64)


def sign(w):
    return np.where(f64(w) < 0, -1.0, 1.0)


def mean_center(w):
    w = f64(w).copy()
    for position in np.ndindex(w.shape[:-2]):
        for channel in range(w.shape[-1]):
            inputs = w[position][:, channel]
            inputs -= sum(inputs) / len(inputs)
    return w


def clamp(w, bound=1.0):
    return np.minimum(np.maximum(f64(w), -bound), bound)


def project(w):
    return clamp(mean_center(w))


def scale(w):
    w = f64(w)
    return np.array([sum(abs(f)) / len(f) for f in _filters(w)])


def binarize(w):
    return _per_filter(lambda f: sum(abs(f)) / len(f) * sign(f), w)


def rule(name, w, g):
    centring = 1 - 1 / w.shape[-2]

    def latent(w, g):
        n, alpha, s = len(w), sum(abs(w)) / len(w), sign(w)
        through_scale = s * sum(s * g) / n
        match name:
            case "corrected":
                exact = alpha * (abs(w) <= 1) * g + through_scale
                return exact * centring * n
            case "paper":
                return g * (alpha * (abs(w) < 1) + 1 / n) * centring * n
            case "exact":
                return alpha * (abs(w) <= 1) * g + through_scale
            case "ste":
                return g * (abs(w) <= 1)

    return _per_filter(latent, w, g)


def rule_size(name, w, g):
    """A bound on the terms that cancel in `rule`."""
    factor = w[..., 0].size if name in ("corrected", "paper") else 1
    return factor * (1 + np.abs(f64(w)).max()) * np.abs(f64(g)).max()


def _filters(array):
    return [array[..., channel].ravel() for channel in range(array.shape[-1])]


def _per_filter(function, *arrays):
    arrays = [f64(array) for array in arrays]
    shape = arrays[0].shape[:-1]
    columns = zip(*(_filters(array) for array in arrays), strict=True)
    return np.stack([function(*c).reshape(shape) for c in columns], axis=-1)


def in_float64(tree: Any) -> Any:
    """Cast floating leaves to float64; requires `jax.enable_x64`."""

    def wide(leaf):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float64) if floating else leaf

    return jax.tree.map(wide, tree)
