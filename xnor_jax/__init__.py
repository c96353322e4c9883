"""XNOR-Networks in JAX: pure functions that train networks of one bit per weight."""

from xnor_jax import (
    deploy,
    masks,
    models,
    nn,
    ops,
    optim,
    quantizers,
    rules,
    weights,
)
from xnor_jax.deploy import load, pack, save
from xnor_jax.masks import inner_kernels, mask_by_path
from xnor_jax.quantizers import sign_ste
from xnor_jax.weights import (
    binarize,
    clamp,
    mean_center,
    project,
    scale,
    sign,
)

__version__ = "0.1.0"

__all__ = [
    "binarize",
    "clamp",
    "deploy",
    "inner_kernels",
    "load",
    "mask_by_path",
    "masks",
    "mean_center",
    "models",
    "nn",
    "ops",
    "optim",
    "pack",
    "project",
    "quantizers",
    "rules",
    "save",
    "scale",
    "sign",
    "sign_ste",
    "weights",
]
