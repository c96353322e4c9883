"""A packed network in floats again: what its speed is compared with.

The layers are those of training's evaluation as XLA runs them: float products of
signs, α, bias, ReLU and max-pools; in place of a threshold, one multiplication and one
addition a channel before the next sign, as BatchNorm's are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xnor_jax import convolution, ops
from xnor_jax.deploy import stages
from xnor_jax.deploy.packed import PackedModel
from xnor_jax.deploy.stage import Spec, Stage
from xnor_jax.geometry import pool_geometry
from xnor_jax.ops import Affine, Threshold
from xnor_jax.weights import sign

Layer = Callable[[jax.Array], jax.Array]


def unpack(packed: PackedModel, *, xla_conv: bool = False) -> Callable:
    """The network in floats alone, which no backend of `xnor_jax.ops` runs.

    Args:
      packed: From `xnor_jax.pack` or `xnor_jax.load`.
      xla_conv: Whether every convolution is XLA's own; otherwise each is written as
        `xnor_jax.convolution` finds it quickest.

    Returns:
      A function from float images `[N, *image_shape]` to the packed network's logits,
      to rounding. Under `jax.jit` the weights are constants of the program.

    Raises:
      ValueError: If the network has its own `__call__`.
    """
    conv = convolution.xla_conv if xla_conv else convolution.conv
    layers, spec = [], Spec(packed.image_shape)
    for stage in packed.stages:
        layers.append(_layer(stage, spec, conv))
        spec = stage.out(spec)

    def run(x: ArrayLike) -> jax.Array:
        y = jnp.asarray(x, jnp.float32)
        for layer in layers:
            y = layer(y)
        return y

    return run


def _layer(stage: Stage, spec: Spec, conv: Callable[..., jax.Array]) -> Layer:
    """A stage on floats; where a stage gives bits, the signs of the floats count."""
    if stage.kind not in stages.STAGES:
        raise ValueError(
            f"expected a network that lists its layers, got {stage.name} with a "
            "__call__ of its own"
        )
    if isinstance(stage, stages.RealConv):
        product = _product(stage, spec, stage.kernel, conv)
        epilogue = _epilogue(stage.epilogue)
        return lambda x: epilogue(product(x))
    if isinstance(stage, stages.PackedConv):
        product = _product(stage, spec, ops.unpack_kernel(stage.kernel), conv)
        epilogue = _epilogue(stage.epilogue)
        return lambda x: epilogue(product(sign(x)))
    if isinstance(stage, stages.ScaledConv):
        product = _product(stage, spec, ops.unpack_kernel(stage.kernel), conv)
        scale, bias = stage.scale, stage.bias
        return lambda x: scale * product(sign(x)) * stage.input_scale(x) + bias
    if isinstance(stage, stages.BitsPool):
        return _max_pool(stage, spec)
    if isinstance(stage, stages.SumPool):
        epilogue = _epilogue(stage.threshold)
        geometry = pool_geometry(stage.kind, spec.shape[:-1], **stage.geometry)
        return lambda x: epilogue(convolution.sum_pool(x, geometry))
    if isinstance(stage, stages.Sign):
        return lambda x: x
    return lambda x: stage(x, "float")


def _product(
    stage: Any, spec: Spec, kernel: jax.Array, conv: Callable[..., jax.Array]
) -> Layer:
    window, features = kernel.shape[:-2], kernel.shape[-1]
    if not window:
        return lambda x: convolution.dot(x, kernel)
    pads = any(map(any, stage.padding))
    if spec.shape[:-1] == window and stage.groups == 1 and not pads:
        # A dense layer on an image, as it was before it was packed.
        matrix, out = kernel.reshape(-1, features), (*(1 for _ in window), features)
        return lambda x: convolution.dot(x.reshape(len(x), -1), matrix).reshape(
            -1, *out
        )
    return lambda x: conv(
        x,
        kernel,
        strides=stage.strides,
        padding=stage.padding,
        dilation=stage.dilation,
        groups=stage.groups,
    )


def _epilogue(epilogue: Affine | Threshold) -> Layer:
    if isinstance(epilogue, Threshold):
        scale, bias = _as_affine(epilogue)
        return lambda y: scale * y + bias
    affine = epilogue
    if affine.relu:
        return lambda y: jax.nn.relu(affine.scale * y + affine.bias)
    return lambda y: affine.scale * y + affine.bias


def _as_affine(epilogue: Threshold) -> tuple[jax.Array, jax.Array]:
    """Scale and bias after which a sum's sign is what the threshold gives."""
    threshold = epilogue.threshold
    scale = ops.unpack_bits(epilogue.flip, threshold.shape[-1])
    # Turned round, a sum at the threshold is −1 and the one below it +1.
    if jnp.issubdtype(threshold.dtype, jnp.integer):
        threshold = threshold.astype(jnp.float32)
        below = threshold - 1
    else:
        below = jnp.nextafter(threshold, jnp.float32(-jnp.inf))
    return scale, -scale * jnp.where(scale < 0, below, threshold)


def _max_pool(stage: stages.BitsPool, spec: Spec) -> Layer:
    pool = stages.FloatPool(**stage.geometry)
    direction = ops.unpack_bits(stage.flip, spec.shape[-1])
    if bool((direction > 0).all()):
        return lambda x: pool(x, "float")
    return lambda x: direction * pool(direction * x, "float")
