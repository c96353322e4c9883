"""From a network that lists its layers to plain steps, and refusals that name a layer.

What a layer does is known only where its class's own `__call__` runs: a subclass that
overrides it is another layer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from xnor_jax import layers, masks, nn
from xnor_jax._tree import Mask, resolve_mask
from xnor_jax.geometry import Padding, per_axis
from xnor_jax.masks import path_string
from xnor_jax.ops.training import conv_general_dilated
from xnor_jax.quantizers import sign_ste
from xnor_jax.weights import binarize, scale, sign


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or dense layer.

    Attributes:
      name: The layer's path in the model.
      kernel: `[*window, C_in / groups, C_out]`; of a binary layer the signs.
      scale: α `[C_out]`; None for a real layer.
      bias: `[C_out]`, or None.
      padding: As the layer was given it.
      input_scale: Whether a binary layer multiplies by `K`.
      signs: Whether a binary layer takes the signs of its input itself.
      flat: Whether the one position that comes out is to be flattened away.
    """

    name: str
    kernel: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    strides: tuple[int, ...] = ()
    padding: Padding = "VALID"
    dilation: tuple[int, ...] = ()
    groups: int = 1
    input_scale: bool = False
    signs: bool = True
    flat: bool = False

    @property
    def window(self) -> tuple[int, ...]:
        """The kernel's spatial sizes, `()` for a dense layer."""
        return tuple(self.kernel.shape[:-2])

    @property
    def parameters(self) -> int:
        """How many parameters the layer has."""
        return self.kernel.size + (0 if self.bias is None else self.bias.size)


@dataclass(frozen=True, eq=False)
class Step:
    """A layer that is no product.

    Attributes:
      name: The layer's path in the model, or its place among the layers.
      layer: `nnx.relu`, `sign`, a layer of `xnor_jax.layers`, or an `nnx.BatchNorm`.
    """

    name: str
    layer: Any


def check_numbers(model: nnx.Module) -> None:
    """Refuse a model that has not float32 numbers, all of them finite.

    Raises:
      ValueError: Naming the parameter or statistic.
      TypeError: If the model has no numbers yet, or is traced.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    for path, leaf in jax.tree.leaves_with_path(state):
        at = path_string(path)
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                f"pack: expected a model with numbers, got {type(leaf).__name__} at "
                f"{at}; call pack outside jit, on a model that is not abstract"
            )
        if leaf.dtype != jnp.float32:
            raise ValueError(f"pack: expected float32, got {leaf.dtype} at {at}")
        if not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"pack: expected finite numbers, got NaN or inf at {at}")
    for path, module in nnx.iter_modules(model):
        dtype = getattr(module, "dtype", None)
        if dtype is not None and dtype != jnp.float32:
            raise ValueError(
                f"pack: expected a layer that computes in float32, got "
                f"{jnp.dtype(dtype)} at {'/'.join(map(str, path))}"
            )


def masked_kernels(model: nnx.Module, mask: Mask) -> dict[int, str]:
    """The variables that a mask selects: their `id`, and their path.

    Raises:
      ValueError: If the mask fits no leaf.
    """
    if mask is None:
        return {}
    params = nnx.state(model, nnx.Param)
    chosen = {
        path_string(path)
        for path, on in jax.tree.leaves_with_path(resolve_mask("pack", mask, params))
        if on
    }
    found = {}
    for path, module in nnx.iter_modules(model):
        for name, variable in vars(module).items():
            at = "/".join(map(str, (*path, name)))
            if isinstance(variable, nnx.Param) and at in chosen:
                found[id(variable)] = at
    if missing := chosen - set(found.values()):
        raise ValueError(
            f"pack: the mask selects {', '.join(sorted(missing))}, no parameter of a "
            "layer"
        )
    return found


def is_sequential(model: Any) -> bool:
    """Whether the model runs what it lists, one layer after another."""
    return isinstance(model, nnx.Module) and (
        exactly(model, layers.Layered) or exactly(model, nnx.Sequential)
    )


def exactly(layer: Any, kind: type) -> bool:
    """Whether a layer is of this class and calls what this class calls."""
    own: Any = kind
    return isinstance(layer, kind) and type(layer).__call__ is own.__call__


def read(model: nnx.Module, mask: Mask) -> list[Product | Step]:
    """The steps of a sequential network, in the order of execution.

    Args:
      model: For which `is_sequential` holds.
      mask: Kernels of `nnx.Conv` and `nnx.Linear` that are binary, or None.

    Raises:
      ValueError: If a layer is not known, or the mask selects what is no kernel of a
        layer that can be packed.
    """
    masked = masked_kernels(model, mask)
    names = {
        id(module): "/".join(map(str, path)) for path, module in nnx.iter_modules(model)
    }
    steps = list(_steps(model, "", names, masked))
    read_kernels = {
        step.name
        for step in steps
        if isinstance(step, Product) and step.scale is not None
    }
    for at in masked.values():
        if at.removesuffix("kernel").rstrip("/") not in read_kernels:
            raise ValueError(
                f"pack: the mask selects {at}, which no layer that runs multiplies by"
            )
    return steps


def product(
    layer: nnx.Module, name: str, masked: dict[int, str] | None = None
) -> Product | None:
    """A convolution or dense layer as a step; None if the layer is none.

    Args:
      layer: Any module.
      name: For errors.
      masked: The binary kernels of `nnx.Conv` and `nnx.Linear`, as `masked_kernels`.

    Raises:
      ValueError: If it has a setting that is not known here.
    """
    masked = masked or {}
    # The class is Any: Flax's layers and ours have no type in common.
    known: Any = layer
    settings: dict[str, Any] = {}
    if exactly(layer, nn.BinaryConv) or exactly(layer, nn.BinaryLinear):
        kernel, bias = known.kernel[...], _bias(known)
        is_masked = id(known.kernel) in masked
        if known.binary or is_masked:
            kernel, alpha = _binary(kernel, latent=not known.binary)
        else:
            alpha = None
        settings["input_scale"] = known.binary and known.input_scale
        settings["signs"] = known.binary
    elif exactly(layer, nnx.Conv) or exactly(layer, nnx.Linear):
        _check_flax_layer(known, name)
        kernel, bias, alpha = known.kernel[...], _bias(known), None
        if id(known.kernel) in masked:
            kernel, alpha = _binary(kernel, latent=True)
        settings["signs"] = False
    elif isinstance(layer, nn.BinaryConv | nn.BinaryLinear) and layer.binary:
        raise ValueError(
            f"pack: {name}: {_describe(layer)} has a __call__ of its own and cannot be "
            "packed; let it call the layer instead of being one"
        )
    else:
        return None
    if kernel.ndim != masks.kernel_rank(layer):
        if alpha is None:
            return None
        raise ValueError(
            f"pack: {name}: expected one layer, got a stack of {_describe(layer)} with "
            f"a kernel of shape {kernel.shape}, as nnx.vmap makes it; packing needs "
            "each layer as a module of its own, such as the items of an nnx.List"
        )
    if kernel.ndim > 2:
        settings |= _geometry(known, name)
    return Product(name, kernel, alpha, bias, **settings)


def _binary(kernel: jax.Array, *, latent: bool) -> tuple[jax.Array, jax.Array]:
    """The signs and α, as the layer computes them in evaluation."""
    if latent:
        return jax.jit(lambda w: (sign(w), scale(w)))(kernel)

    def of_the_view(w):
        view = binarize(w, rule="ste")
        return sign(view), scale(view)

    return jax.jit(of_the_view)(kernel)


def _bias(layer: Any) -> jax.Array | None:
    return None if layer.bias is None else layer.bias[...]


def _geometry(layer: Any, name: str) -> dict[str, Any]:
    rank = len(layer.kernel_size)
    padding = layer.padding
    strides, dilation = (
        per_axis(f"pack: {name}", argument, 1 if value is None else value, rank)
        for argument, value in (
            ("strides", layer.strides),
            ("kernel_dilation", layer.kernel_dilation),
        )
    )
    if padding == "CAUSAL" and rank == 1:
        padding = (((layer.kernel_size[0] - 1) * dilation[0], 0),)
    elif isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise ValueError(f"pack: {name}: padding {padding!r} cannot be packed")
    return {
        "strides": strides,
        "padding": padding,
        "dilation": dilation,
        "groups": layer.feature_group_count,
    }


def _check_flax_layer(layer: Any, name: str) -> None:
    wanted: dict[str, tuple[Any, ...]] = {"preferred_element_type": (None, jnp.float32)}
    if isinstance(layer, nnx.Conv):
        ours = conv_general_dilated
        wanted["conv_general_dilated"] = (jax.lax.conv_general_dilated, ours)
        wanted["mask"] = (None,)
        wanted["input_dilation"] = (None, 1, (1,) * len(layer.kernel_size))
    else:
        wanted["dot_general"] = (jax.lax.dot_general,)
    for setting, values in wanted.items():
        value = getattr(layer, setting)
        value = value.func if isinstance(value, partial) else value
        value = tuple(value) if isinstance(value, list) else value
        if not any(value is one or _equal(value, one) for one in values):
            raise ValueError(f"pack: {name}: {setting} cannot be packed, got {value!r}")


def _equal(value: Any, one: Any) -> bool:
    # An array, such as a mask, has no one truth.
    return isinstance(value, int | tuple | type) and value == one


def _steps(
    model: Any, prefix: str, names: dict[int, str], masked: dict[int, str]
) -> Iterable[Product | Step]:
    layer: Any
    runs = model.layers() if isinstance(model, layers.Layered) else model.layers
    for index, layer in enumerate(_as_sequence(runs, prefix)):
        place = f"{prefix}/layers[{index}]".lstrip("/")
        name = names.get(id(layer), place)
        if is_sequential(layer):
            yield from _steps(layer, name, names, masked)
        elif exactly(layer, nn.XnorBlock):
            yield from _block(layer, name, masked)
        elif isinstance(layer, nnx.Dropout):
            continue
        elif isinstance(layer, nnx.Module) and (found := product(layer, name, masked)):
            yield from _with_sign(found)
        elif exactly(layer, nnx.BatchNorm):
            yield _norm(layer, name)
        elif layer is nnx.relu or layer is jax.nn.relu:
            yield Step(name, nnx.relu)
        elif layer is sign or layer is sign_ste:
            yield Step(name, sign)
        elif isinstance(
            layer,
            layers.MaxPool | layers.AvgPool | layers.GlobalAveragePool | layers.Flatten,
        ):
            yield Step(name, layer)
        else:
            raise ValueError(
                f"pack: {name}: {_describe(layer)} cannot be packed; see "
                "xnor_jax.nn.Layered for what can, or give pack a mask and an example "
                "of a network with a __call__ of its own"
            )


def _as_sequence(runs: Any, prefix: str) -> Sequence[Callable[..., Any]]:
    if not isinstance(runs, list | tuple | nnx.List):
        raise ValueError(
            f"pack: expected layers() to return a sequence{prefix and f' at {prefix}'}"
            f", got {type(runs).__name__}"
        )
    return runs


def _block(block: nn.XnorBlock, name: str, masked) -> Iterable[Product | Step]:
    yield _norm(block.norm, f"{name}/norm")
    if isinstance(block.layer, nn.BinaryLinear):
        yield Step(name, layers.Flatten())
    found = product(block.layer, f"{name}/layer", masked)
    if found is None:
        raise ValueError(
            f"pack: {name}/layer: {_describe(block.layer)} cannot be packed"
        )
    yield from _with_sign(found)
    if block.relu:
        yield Step(name, nnx.relu)


def _with_sign(found: Product) -> Iterable[Product | Step]:
    if found.scale is not None and found.signs and not found.input_scale:
        yield Step(found.name, sign)
    yield found


def _norm(norm: Any, name: str) -> Step:
    if not exactly(norm, nnx.BatchNorm):
        raise ValueError(f"pack: {name}: {_describe(norm)} cannot be packed")
    if norm.axis != -1:
        raise ValueError(
            f"pack: {name}: expected BatchNorm over the last axis, got {norm.axis}"
        )
    return Step(name, norm)


def _describe(layer: Any) -> str:
    return getattr(layer, "__name__", type(layer).__name__)
