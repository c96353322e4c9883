"""A recipe's network: its builder, its shapes and dtypes, and its binary kernels."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from xnor_jax import masks, nn, quantizers, weights
from xnor_jax.registry import MODELS, describe
from xnor_jax.train import custom
from xnor_jax.train.custom import RecipeError
from xnor_jax.train.recipe import Recipe, model_options


def builder(
    recipe: Recipe,
    *,
    image_shape: tuple[int, ...],
    classes: int,
    backend: str = "auto",
) -> Callable[[], nnx.Module]:
    """Return a function that builds the network with its initial weights.

    Args:
      recipe: The recipe of the network.
      image_shape: Height, width, channels.
      classes: The number of logits.
      backend: The backend of the binary products; see `xnor_jax.nn.BinaryConv`.
    """
    model = recipe.model if callable(recipe.model) else MODELS[recipe.model]
    taken = custom.arguments(
        "model",
        model,
        {
            "image_shape": image_shape,
            "classes": classes,
            "rngs": None,
            "backend": backend,
            **model_options(recipe),
        },
    )

    def build() -> nnx.Module:
        keys = {"rngs": nnx.Rngs(recipe.seed)} if "rngs" in taken else {}
        return model(**taken | keys)

    return build


def abstract(
    recipe: Recipe,
    build: Callable[[], nnx.Module],
    image_shape: tuple[int, ...],
    classes: int,
) -> nnx.Module:
    """Build the network as shapes and dtypes only.

    Raises:
      RecipeError: If it cannot be built for such images, or a custom network does not
        map them to logits.
    """
    sizes = "×".join(map(str, image_shape))
    with custom.errors("model", recipe.model, f"for images of {sizes}"):
        model = nnx.eval_shape(build)
    if not callable(recipe.model):
        return model
    name = describe(recipe.model)
    if not isinstance(model, nnx.Module):
        raise RecipeError(
            f"expected {name} to return an nnx.Module, got {type(model).__name__}",
            field="model",
        )
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)

    def logits(images: jax.Array) -> Any:
        built = build()
        built.eval()
        return built(images)  # type: ignore[operator]

    with custom.errors("model", recipe.model, f"for images of {sizes}"):
        out = jax.eval_shape(logits, images)
    if getattr(out, "shape", None) != (2, classes):
        got = f"shape {out.shape}" if hasattr(out, "shape") else type(out).__name__
        raise RecipeError(
            f"expected {name} to return logits of shape (2, {classes}) for 2 images of "
            f"{sizes} in {classes} classes, got {got}",
            field="model",
        )
    return model


def binary_kernels(model: nnx.Module) -> Any:
    """Mark the kernels of the model's `BinaryConv` and `BinaryLinear` layers.

    Returns:
      A bool tree of the structure of `nnx.state(model, nnx.Param)`.
    """
    layers = {
        "/".join(map(str, (*path, "kernel")))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nn.BinaryConv | nn.BinaryLinear)
    }
    params = nnx.state(model, nnx.Param)
    return jax.tree.map_with_path(
        lambda path, _: masks.path_string(path) in layers, params
    )


def counted_kernels(model: nnx.Module) -> Any:
    """Mark the kernels whose sign flips are counted.

    They are the binary kernels or, in a model without any, such as a float twin of
    plain Flax layers, the inner ones.

    Returns:
      A bool tree of the structure of `nnx.state(model, nnx.Param)`.

    Raises:
      RecipeError: If the model has neither.
    """
    binary = binary_kernels(model)
    if any(jax.tree.leaves(binary)):
        return binary
    try:
        return masks.inner_kernels(model)
    except ValueError as error:
        reason = str(error).removeprefix("inner_kernels: ").partition(";")[0]
        raise RecipeError(
            f"expected BinaryConv or BinaryLinear layers in {type(model).__name__}, or "
            f"kernels between a first and a last one: {reason}",
            field="model",
        ) from error


def set_temperature(model: nnx.Module, progress: jax.Array) -> None:
    """Set the temperature of a model's `"tanh"` surrogates by IR-Net's error decay.

    `t = 10^(−1 + 2·progress)` rises from 0.1, a wide surrogate, to 10, nearly the sign.

    Args:
      model: The model, changed in place.
      progress: The completed fraction of the training, in [0, 1]; may be traced.

    References:
      Qin et al., Forward and Backward Information Retention for Accurate Binary Neural
      Networks, 2020, §3.3.
    """
    surrogate = partial(quantizers.tanh, temperature=10 ** (2 * progress - 1))
    module: Any
    for _, module in nnx.iter_modules(model):
        if getattr(module, "surrogate", None) == "tanh":
            module.surrogate = surrogate


def set_quantile(model: nnx.Module, progress: jax.Array) -> None:
    """Set the quantile τ of a model's `"recu"` weight methods.

    `τ = a·e^progress + b` rises from 0.85 to 0.99.

    Args:
      model: The model, changed in place.
      progress: The completed fraction of the training, in [0, 1]; may be traced.

    References:
      Xu et al., ReCU, 2021, §3.3; z-hXu/ReCU, `cifar/main.py`.
    """
    tau: Any = 0.85 + 0.14 * (jnp.exp(progress) - 1) / (math.e - 1)
    # A concrete τ is a number, so that the model can be compared and copied.
    tau = tau if isinstance(tau, Tracer) else float(tau)
    module: Any
    for _, module in nnx.iter_modules(model):
        if getattr(module, "weight_method", None) == "recu":
            module.weight_method = partial(weights.recu, tau=tau)
