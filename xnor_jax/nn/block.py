"""The block of XNOR-Net."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from xnor_jax.nn.binary import BinaryConv, BinaryLinear
from xnor_jax.nn.norm import BatchNorm


class XnorBlock(nnx.Module):
    """XNOR-Net's block: BatchNorm → sign → (dropout) → convolution or dense → ReLU.

    Args:
      in_features: Input channels of the convolution, or features of the dense layer.
      out_features: Output channels or features.
      kernel_size: The convolution's window; None for a dense layer.
      norm_features: Channels of the BatchNorm; None for `in_features`. A dense block
        after a convolution normalizes the channels, then flattens `[N, H, W, C]`.
      epsilon: BatchNorm's ε.
      momentum: BatchNorm's momentum, as in Flax: the decay rate of the averages.
      relu: Whether to apply a ReLU to the result.
      backend: The backend of the layer and of BatchNorm: see `BinaryConv`.
      rngs: Keys for the parameters and the dropout.
      **layer: Passed on to `BinaryConv` or `BinaryLinear`, such as `rule` and
        `surrogate`.

    Raises:
      ValueError: If a setting of the layer is invalid, or `surrogate` is None, because
        BatchNorm's output is not ±1.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2 and Table 3: 44.2 %, against 30.3 % for
      the usual order.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int] | None = None,
        *,
        norm_features: int | None = None,
        epsilon: float = 1e-4,
        momentum: float = 0.9,
        relu: bool = True,
        backend: str = "auto",
        rngs: nnx.Rngs,
        **layer: Any,
    ):
        if layer.get("surrogate", "ste") is None:
            raise ValueError(
                "XnorBlock: surrogate=None is for a layer whose input is ±1, and "
                "BatchNorm's output is not; give a surrogate, or use BinaryConv"
            )
        self.norm = BatchNorm(
            norm_features or in_features,
            momentum=momentum,
            epsilon=epsilon,
            backend=backend,
            rngs=rngs,
        )
        layer = {"backend": backend, "rngs": rngs, **layer}
        # Not read from the layer, which a user may replace.
        self.flatten = kernel_size is None
        if kernel_size is None:
            self.layer = BinaryLinear(in_features, out_features, **layer)
        else:
            self.layer = BinaryConv(in_features, out_features, kernel_size, **layer)
        self.relu = relu

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, *out, C_out]`, or to `[N, C_out]` if dense."""
        x = self.norm(jnp.asarray(x))
        if self.flatten:
            x = x.reshape(x.shape[0], -1)
        if type(self.layer) in (BinaryConv, BinaryLinear):
            return self.layer.then(x, relu=self.relu)
        x = self.layer(x)
        return nnx.relu(x) if self.relu else x
