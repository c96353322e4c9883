"""From the steps of a network to the stages that run on bits.

A product, or the sum of an average-pool, is followed by steps that are monotone in each
channel: BatchNorm, ReLU, max-pool. Where the signs of what comes out feed a binary
layer, all of it becomes one threshold, and the max-pools work on bits. Elsewhere the
steps stay what they are, on floats.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xnor_jax import layers
from xnor_jax.deploy import fold, stages
from xnor_jax.deploy.reading import Product, Step
from xnor_jax.deploy.stage import Spec, Stage
from xnor_jax.geometry import conv_geometry
from xnor_jax.ops import Affine, Threshold, pack_kernel
from xnor_jax.weights import sign

Steps = list[Product | Step]
Shape = tuple[int, ...]


def build(steps: Steps, image_shape: Shape) -> tuple[Stage, ...]:
    """The stages of a network.

    Args:
      steps: What the network runs, in order.
      image_shape: The input's shape without the batch.

    Raises:
      ValueError: Naming the layer: if it does not fit the one before, the signs of
        something feed no binary layer, a binary layer gets no signs, or its numbers
        overflow.
    """
    steps = arrange(steps, image_shape)
    for at, step in enumerate(steps, start=1):
        if _layer(step) is sign:
            with _naming(step.name):
                _check_use_of_signs(steps[at:])
    builder = _Builder(steps, image_shape)
    while builder.at < len(builder.steps):
        builder.advance()
    return tuple(builder.stages)


def arrange(steps: Steps, image_shape: Shape) -> Steps:
    """The same network, its paddings in numbers, and no flattening before a sign.

    Flattening is put off until after what works on each number alone; a dense layer of
    signs on an image then is a convolution with a window of the image's size.

    Raises:
      ValueError: Naming a layer that does not fit the shape it gets.
    """
    steps, shape, at = list(steps), tuple(image_shape), 0
    while at < len(steps):
        step = steps[at]
        if isinstance(_layer(step), layers.Flatten):
            after = steps[at + 1] if at + 1 < len(steps) else None
            if len(shape) == 1:
                del steps[at]
                continue
            if _commutes(after, shape):
                steps[at : at + 2] = steps[at + 1], step
                continue
            if isinstance(after, Product) and _on_bits(after) and not after.window:
                with _naming(after.name):
                    steps[at : at + 2] = [_windowed(after, shape)]
                continue
        with _naming(step.name):
            steps[at], shape = _placed(step, shape)
        at += 1
    return steps


@dataclass(frozen=True)
class _Fold:
    """All that stands between a sum and a sign."""

    norms: list[Step]
    pools: list[tuple[Step, np.ndarray]]  # with the channels in which the rest falls
    value: fold.Value
    states: list[Any]
    end: int  # where the steps go on

    @property
    def parameters(self) -> int:
        return sum(map(_norm_parameters, self.norms))


class _Builder:
    """Goes over the steps; `spec` is what has been computed so far."""

    def __init__(self, steps: Steps, image_shape: Shape):
        self.steps = steps
        self.at = 0
        self.spec = Spec(tuple(image_shape))
        self.stages: list[Stage] = []

    def advance(self) -> None:
        """Turn the step at hand, and those that fold into it, into stages."""
        step = self.steps[self.at]
        self.at += 1
        with _naming(step.name):
            if isinstance(step, Product):
                self._product(step)
            elif self.spec.bits:
                self._on_bits(step)
            else:
                self._on_floats(step)

    def _emit(self, stage: Stage) -> None:
        self.spec = stage.out(self.spec)
        self.stages.append(stage)

    def _product(self, step: Product) -> None:
        if _on_bits(step) and not self.spec.bits:
            raise ValueError(
                "the mask selects its kernel, but its input is not signs; put "
                "xnor_jax.sign_ste before it"
            )
        if self.spec.bits and not _on_bits(step):
            raise ValueError("cannot be packed, it is real and its input is signs")
        bias = step.bias if step.bias is not None else _zeros(step)
        settings: dict[str, Any] = {"name": step.name, "parameters": step.parameters}
        if step.window:
            settings |= {
                "strides": step.strides,
                "padding": step.padding,
                "dilation": step.dilation,
                "groups": step.groups,
            }
        if step.scale is None:
            settings["kernel"] = step.kernel
        else:
            settings["kernel"] = pack_kernel(step.kernel, step.groups)
        if step.scale is not None and step.input_scale:
            self._emit(stages.ScaledConv(scale=step.scale, bias=bias, **settings))
            return
        found = self._until_sign()
        if found is None:
            ones = np.ones(bias.shape, np.float32)
            scale = jnp.asarray(ones) if step.scale is None else step.scale
            settings["epilogue"] = Affine(scale, bias, self._take_relu())
        else:
            settings["epilogue"] = _threshold_of_product(step, found)
            settings["parameters"] += found.parameters
        kind = stages.RealConv if step.scale is None else stages.PackedConv
        self._emit(kind(**settings))
        if step.flat:
            self._emit(stages.Flatten(name=step.name))
        self._finish(found)

    def _take_relu(self) -> bool:
        relu = any(_layer(s) is nnx.relu for s in self.steps[self.at : self.at + 1])
        self.at += relu
        return relu

    def _on_floats(self, step: Step) -> None:
        layer, name = step.layer, step.name
        if layer is nnx.relu:
            self._emit(stages.Relu(name=name))
        elif layer is sign:
            self._emit(stages.Sign(name=name))
        elif isinstance(layer, nnx.BatchNorm):
            self._emit(_norm_stage(step))
        elif isinstance(layer, layers.Flatten):
            self._emit(stages.Flatten(name=name))
        elif isinstance(layer, layers.GlobalAveragePool):
            self._emit(stages.Mean(name=name))
        else:
            self._pool(step)

    def _pool(self, step: Step) -> None:
        settings = {"name": step.name, **_geometry(step)}
        mean = isinstance(step.layer, layers.AvgPool)
        window = step.layer.window
        found = self._until_sign() if mean and len(window) == 2 else None
        if found is None:
            self._emit(stages.FloatPool(mean=mean, **settings))
            return

        def value(states, sums):
            # As the float layer divides.
            return found.value(states, sums / prod(window))

        features = self.spec.shape[-1]
        threshold = fold.float_threshold(value, found.states, features=features)
        settings["parameters"] = found.parameters
        self._emit(stages.SumPool(threshold=threshold, **settings))
        self._finish(found)

    def _on_bits(self, step: Step) -> None:
        if isinstance(step.layer, layers.MaxPool):
            # The largest of some signs: the rising case.
            self._emit_bits_pool(step, np.zeros((), bool))
        elif step.layer is not sign:
            raise ValueError("cannot be packed, its input is signs")

    def _finish(self, found: _Fold | None) -> None:
        """Pool the bits, and go on behind the sign."""
        if found is not None:
            for step, falls in found.pools:
                self._emit_bits_pool(step, falls)
            self.at = found.end

    def _emit_bits_pool(self, step: Step, falls: np.ndarray) -> None:
        flip = fold.flip_words(np.broadcast_to(falls, self.spec.shape[-1:]))
        self._emit(stages.BitsPool(name=step.name, flip=flip, **_geometry(step)))

    def _until_sign(self) -> _Fold | None:
        """What stands between here and a sign, if it is monotone in each channel."""
        norms: list[Step] = []
        pools: list[tuple[Step, int]] = []
        functions: list[Callable[[Any, jax.Array], jax.Array]] = []
        states: list[Any] = []
        end = self.at
        for step in self.steps[self.at :]:
            end += 1
            layer = _layer(step)
            if layer is sign:
                break
            if isinstance(layer, nnx.BatchNorm):
                graphdef, state = nnx.split(layer)
                functions.append(_evaluation(graphdef))
                states.append(state)
                norms.append(step)  # type: ignore[arg-type]
            elif layer is nnx.relu:
                functions.append(lambda _, y: nnx.relu(y))
                states.append(None)
            elif isinstance(layer, layers.MaxPool):
                pools.append((step, len(norms)))  # type: ignore[arg-type]
            else:
                return None
        else:
            return None

        def value(states, y):
            for function, state in zip(functions, states, strict=True):
                y = function(state, y)
            return y

        falling = [np.asarray(_norm_factor(step)) < 0 for step in norms]
        falls = [(step, _parity(falling[first:])) for step, first in pools]
        return _Fold(norms, falls, value, states, end)


def _threshold_of_product(step: Product, found: _Fold) -> Threshold:
    features = step.kernel.shape[-1]

    def value(params, sums):
        scale, bias, states = params
        y = sums if scale is None else scale * sums
        y = y if bias is None else y + bias
        return found.value(states, y)

    params = (step.scale, step.bias, found.states)
    if step.scale is None:
        return fold.float_threshold(value, params, features=features)
    bound = prod(step.kernel.shape[:-1])
    return fold.integer_threshold(value, params, bound=bound, features=features)


def _evaluation(graphdef: Any) -> Callable[[Any, jax.Array], jax.Array]:
    def evaluate(state, y):
        return nnx.merge(graphdef, state)(y, use_running_average=True)

    return evaluate


@jax.jit
def _factor(var: jax.Array, epsilon: Any, scale: jax.Array | None) -> jax.Array:
    """What `nnx.BatchNorm` multiplies by, rounded as it rounds."""
    factor = jax.lax.rsqrt(var + epsilon)
    return factor if scale is None else factor * scale


def _norm_factor(step: Step) -> jax.Array:
    norm = step.layer
    scale = None if norm.scale is None else norm.scale[...]
    factor = _factor(norm.var[...], norm.epsilon, scale)
    with _naming(step.name):
        if not np.isfinite(np.asarray(factor)).all():
            raise ValueError("scale / √(variance + ε) does not fit float32")
    return factor


def _norm_stage(step: Step) -> stages.Norm:
    norm = step.layer
    mean = norm.mean[...]
    return stages.Norm(
        name=step.name,
        mean=mean,
        scale=_norm_factor(step),
        bias=jnp.zeros_like(mean) if norm.bias is None else norm.bias[...],
        parameters=_norm_parameters(step),
    )


def _norm_parameters(step: Step) -> int:
    norm = step.layer
    return sum(p.size for p in (norm.scale, norm.bias) if p is not None)


def _parity(falling: list[np.ndarray]) -> np.ndarray:
    """The channels in which a chain falls: those with an odd number that fall."""
    return np.logical_xor.reduce(falling) if falling else np.zeros((), bool)


def _layer(step: Product | Step | None) -> Any:
    return step.layer if isinstance(step, Step) else None


def _on_bits(step: Product) -> bool:
    return step.scale is not None and not step.input_scale


def _zeros(step: Product) -> jax.Array:
    return jnp.asarray(np.zeros(step.kernel.shape[-1:], np.float32))


def _geometry(step: Step) -> dict[str, Any]:
    """A pool's window, strides and padding; `arrange` has made them explicit."""
    pool = step.layer
    names = ("window", "strides", "padding")
    return {name: getattr(pool, name) for name in names}


def _commutes(step: Product | Step | None, shape: Shape) -> bool:
    layer = _layer(step)
    if isinstance(layer, nnx.BatchNorm):
        return prod(shape[:-1]) == 1
    return layer is nnx.relu or layer is sign


def _windowed(step: Product, shape: Shape) -> Product:
    *spatial, channels = shape
    if step.kernel.shape[0] != prod(shape):
        raise ValueError(
            f"expected {step.kernel.shape[0]} features, got {prod(shape)} of an image "
            f"of shape {shape}"
        )
    unit = (1,) * len(spatial)
    kernel = step.kernel.reshape(*spatial, channels, -1)
    return replace(step, kernel=kernel, strides=unit, dilation=unit, flat=True)


def _placed(step: Product | Step, shape: Shape) -> tuple[Product | Step, Shape]:
    """The step with its padding in numbers, and the shape that it gives."""
    if isinstance(step, Product):
        return _placed_product(step, shape)
    layer, spatial = step.layer, shape[:-1]
    if isinstance(layer, nnx.BatchNorm) and layer.num_features != shape[-1]:
        raise ValueError(f"expected {layer.num_features} channels, got {shape[-1]}")
    if isinstance(layer, layers.GlobalAveragePool):
        return step, shape[-1:]
    if isinstance(layer, layers.Flatten):
        return step, (prod(shape),)
    if isinstance(layer, layers.MaxPool | layers.AvgPool):
        geometry = layer.geometry(spatial)
        names = ("window", "strides", "padding")
        placed = replace(layer, **{name: getattr(geometry, name) for name in names})
        return replace(step, layer=placed), (*geometry.out, shape[-1])
    return step, shape


def _placed_product(step: Product, shape: Shape) -> tuple[Product, Shape]:
    spatial, features = shape[:-1], step.kernel.shape[-1]
    if step.kernel.shape[-2] * step.groups != shape[-1]:
        raise ValueError(
            f"expected {step.kernel.shape[-2] * step.groups} channels, got {shape[-1]}"
        )
    if not step.window:
        return step, (*spatial, features)
    if len(spatial) != len(step.window):
        raise ValueError(
            f"expected an image of {len(step.window)} spatial axes, got shape {shape}"
        )
    geometry = conv_geometry(
        "conv",
        spatial,
        step.window,
        strides=step.strides,
        padding=step.padding,
        dilation=step.dilation,
    )
    shape = (features,) if step.flat else (*geometry.out, features)
    return replace(step, padding=geometry.padding), shape


def _check_use_of_signs(following: Steps) -> None:
    """Refuse signs that feed no layer on bits: what could be packed would be float."""
    for step in following:
        if isinstance(step, Product) and _on_bits(step):
            return
        if not (_layer(step) is sign or isinstance(_layer(step), layers.MaxPool)):
            break
    raise ValueError(
        "signs that feed no binary layer cannot be packed; take them out, or select "
        "the kernel that they feed with the mask"
    )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of value carry the name of the layer."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("pack: "):
            raise
        raise ValueError(f"pack: {name}: {error}") from error
