"""A packed network computed in floats: the baseline of its timings.

The layers are those of an evaluation in training, as XLA runs them: float products of
signs, α, bias, ReLU and max-pools. A threshold becomes one multiplication and one
addition per channel before the next sign, as in BatchNorm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xnor_jax import convolution, ops
from xnor_jax.ops import Affine
from xnor_jax.packing import graph
from xnor_jax.packing.graph import THRESHOLD, Node, Spec, specs_of
from xnor_jax.packing.network import PackedModel
from xnor_jax.weights import sign


def unpack(packed: PackedModel, *, xla_conv: bool = False) -> Callable:
    """Return the network in floats, without the backends of `xnor_jax.ops`.

    Args:
      packed: From `xnor_jax.pack` or `xnor_jax.load`.
      xla_conv: Whether every convolution is XLA's own; otherwise `xnor_jax.convolution`
        chooses the formulation of each.

    Returns:
      A function from float images `[N, *image_shape]` to the packed network's logits,
      up to rounding. Under `jax.jit` the weights are constants of the program.
    """
    conv = convolution.xla_conv if xla_conv else convolution.conv
    specs = specs_of(packed.nodes, packed.image_shape)

    def run(x: ArrayLike) -> jax.Array:
        # Where the packed network has bits, these are floats of the same signs.
        values = [jnp.asarray(x, jnp.float32)]
        for node in packed.nodes:
            args = [values[i] for i in node.inputs]
            values.append(_node(node, args, [specs[i] for i in node.inputs], conv))
        last = values[-1]
        return sign(last) if specs[-1].bits else last

    return run


def _node(
    node: Node, args: list[jax.Array], specs: Sequence[Spec], conv: Callable
) -> jax.Array:
    if isinstance(node, graph.MaxPoolBits):
        with jax.ensure_compile_time_eval():  # a constant of the program
            direction = ops.unpack_bits(node.arrays["flip"], args[0].shape[-1])
            rises = bool((direction > 0).all())
        x = args[0] if rises else direction * args[0]
        y = graph.Pool(**node.geometry)([x], "float")
        return y if rises else direction * y
    bits = [spec.bits for spec in specs]
    if all(bits) and isinstance(node, graph.MOVES):
        return graph.as_floats(node(args, "float"))
    args = [sign(x) if b else x for x, b in zip(args, bits, strict=True)]
    if isinstance(node, graph.BinaryConv | graph.Conv):
        kernel = node.arrays["kernel"]
        if isinstance(node, graph.BinaryConv):
            kernel = ops.unpack_kernel(kernel)
        sums = _product(node, args[0], kernel, conv)
        if node.epilogue == THRESHOLD:
            return _before_sign(node, sums)
        epilogue: Any = node.affine
        assert isinstance(epilogue, Affine)
        y = epilogue.scale * sums + epilogue.bias
        y = jax.nn.relu(y) if epilogue.relu else y
        return node.normalized(y) if isinstance(node, graph.Conv) and node.scaled else y
    if isinstance(node, graph.SumPoolBits):
        return _before_sign(
            node, convolution.sum_pool(args[0], node.windows(args[0].shape[1:]))
        )
    if isinstance(node, graph.Sign):
        return _before_sign(node, args[0])
    return node(args, "float")


def _product(node: Any, x: jax.Array, kernel: jax.Array, conv: Callable) -> jax.Array:
    if not node.window:
        return convolution.dot(x, kernel)
    pads = any(map(any, node.padding))
    if x.shape[1:-1] == node.window and node.groups == 1 and not pads:
        # A dense layer on a flattened image, as before packing.
        y = convolution.dot(
            x.reshape(x.shape[0], -1), kernel.reshape(-1, node.features)
        )
        return y.reshape(x.shape[0], *(1 for _ in node.window), -1)
    return conv(x, kernel, **node.geometry, groups=node.groups)


def _before_sign(node: Node, sums: jax.Array) -> jax.Array:
    """Scale and shift the sums so that their sign is that of the threshold."""
    threshold = node.arrays["threshold"]
    scale = ops.unpack_bits(node.arrays["flip"], threshold.shape[-1])
    # Where flipped, a sum at the threshold is −1 and the next one below it is +1.
    if jnp.issubdtype(threshold.dtype, jnp.integer):
        threshold = threshold.astype(jnp.float32)
        below = threshold - 1
    else:
        below = jnp.nextafter(threshold, jnp.float32(-jnp.inf))
    return scale * sums - scale * jnp.where(scale < 0, below, threshold)
