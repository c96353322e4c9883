"""Flax NNX layers: what goes in and what is multiplied are signs.

A layer holds latent kernels and computes `α · (sign(x) ⊛ sign(w))`: an integer sum,
then one multiplication per output channel. The integer sum is the same in float32, in
bfloat16 and on bits. With `binary=False` a layer is its float twin: `x ⊛ w`, unsigned.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from xnor_jax import convolution
from xnor_jax.geometry import (
    DENSE,
    Geometry,
    Padding,
    check_padding,
    conv_geometry,
    per_axis,
    positive,
)
from xnor_jax.layers import (
    AvgPool,
    Flatten,
    GlobalAveragePool,
    Layered,
    MaxPool,
    batch_norm,
)
from xnor_jax.ops import training
from xnor_jax.ops.bits import random_bits
from xnor_jax.ops.training import scaled_product
from xnor_jax.rules import Rule
from xnor_jax.weights import binarize

__all__ = [
    "AvgPool",
    "BinaryConv",
    "BinaryLinear",
    "Flatten",
    "GlobalAveragePool",
    "Layered",
    "MaxPool",
    "XnorBlock",
    "scaled_product",
]


class _Binary(nnx.Module):
    """What a binary convolution and a binary dense layer share."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        groups: int,
        use_bias: bool,
        dropout: float,
        input_scale: bool,
        rule: str | Rule,
        multiplier: float,
        binary: bool,
        backend: str,
        dtype: Dtype | None,
        compute_dtype: Dtype,
        param_dtype: Dtype,
        kernel_init: Initializer,
        bias_init: Initializer,
        rngs: nnx.Rngs,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        compute_dtype = jnp.dtype(compute_dtype)
        if compute_dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"compute_dtype: expected float32 or bfloat16, got {compute_dtype}"
            )
        if compute_dtype != jnp.float32 and not binary:
            raise ValueError(
                "compute_dtype: expected float32 with binary=False, whose products "
                f"are not of signs and would be rounded, got {compute_dtype}"
            )
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape[-1:], param_dtype))
            if use_bias
            else None
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.input_scale = input_scale
        self.rule = rule
        self.multiplier = multiplier
        self.binary = binary
        self.groups = groups
        self.backend = backend
        self.dtype = dtype
        self.compute_dtype = compute_dtype

    def _apply(
        self,
        x: jax.Array,
        geometry: Geometry,
        product: Callable[..., jax.Array],
        average: Callable[[jax.Array], jax.Array],
        *,
        relu: bool,
    ) -> jax.Array:
        kernel = self.kernel[...]
        dtype = self.dtype or jnp.result_type(x, kernel)
        x = x.astype(dtype)
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        if not self.binary:
            x = self.dropout(x) if self.dropout else x
            y = product(x, kernel.astype(dtype), backend=self.backend)
            y = y if bias is None else y + bias
            return nnx.relu(y) if relu else y
        binary_kernel = binarize(kernel, rule=self.rule, multiplier=self.multiplier)
        scaled = partial(
            training.binary_product,
            geometry=geometry,
            groups=self.groups,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
            **self._drop(x),
        )
        if not self.input_scale:
            return scaled(x, binary_kernel, bias, relu=relu)
        y = scaled(x, binary_kernel)
        y = y * average(jnp.mean(jnp.abs(x), axis=-1, keepdims=True))
        y = y if bias is None else y + bias
        return nnx.relu(y) if relu else y

    def _drop(self, x: jax.Array) -> dict[str, Any]:
        """Which signs stay, in training."""
        if self.dropout is None or self.dropout.deterministic:
            return {}
        stream = self.dropout.rngs
        if self.dropout.rate == 0.5 and isinstance(stream, nnx.RngStream):
            keep = random_bits(stream(), x.shape)
        else:
            keep = self.dropout(jnp.ones_like(x)) > 0
        return {"keep": keep, "keep_rate": 1 - self.dropout.rate}


class BinaryConv(_Binary):
    """A convolution of signs: `K · α · (sign(x) ⊛ sign(w)) + bias`, rank 1 to 3.

    The padding is zeros in ±1 space: a tap outside the image adds 0 to the sum.
    `K` is 1, or with `input_scale` the paper's `A ∗ k`, where `A = mean |x|` over the
    channels and `k` is a box filter `1/(kh·kw)` with the convolution's own geometry.

    Args:
      in_features: Channels in, `C`.
      out_features: Channels out, `C_out`.
      kernel_size: The window, one number per spatial axis; one number for rank 1.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      kernel_dilation: One number, or one per spatial axis.
      feature_group_count: Groups of channels; kernels are `[*window, C/groups, C_out]`.
      use_bias: Whether to add a real bias.
      dropout: Probability in [0, 1) of dropping a sign, in training.
      input_scale: Whether to multiply by `K`.
      rule: The kernel's gradient rule, a name or a function: see `xnor_jax.rules`.
      multiplier: A factor on the rule's gradient.
      binary: False for the float twin.
      backend: What computes the products: `"auto"` takes the compiled library on a
        CPU, and XLA's floats elsewhere; `"float"` takes these everywhere; or another
        of `xnor_jax.ops.available_backends()`. The sums of signs are the same.
      dtype: Of what comes in and goes out; None for that of input and kernel together.
      compute_dtype: Of the operands of the products of signs, float32 or bfloat16. The
        sums are the same integers in both; gradients are rounded to it before they are
        multiplied by signs, and those of signs after it too.
      param_dtype: Of the latent kernel and the bias.
      kernel_init: Initializer of the latent kernel.
      bias_init: Initializer of the bias.
      rngs: Keys `params` and, with dropout, `dropout`.

    Raises:
      ValueError: If channels do not divide into the groups, a geometry does not fit, or
        `compute_dtype` is another or not float32 in the float twin.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dropout: float = 0.0,
        input_scale: bool = False,
        rule: str | Rule = "corrected",
        multiplier: float = 1.0,
        binary: bool = True,
        backend: str = "auto",
        dtype: Dtype | None = None,
        compute_dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        rank = len(kernel_size) if isinstance(kernel_size, Sequence) else 1
        if not 1 <= rank <= 3:
            raise ValueError(
                f"kernel_size: expected 1 to 3 spatial axes, got {kernel_size}"
            )
        window = per_axis("BinaryConv", "kernel_size", kernel_size, rank)
        groups = positive("BinaryConv", "feature_group_count", feature_group_count)
        if in_features % groups or out_features % groups:
            raise ValueError(
                f"feature_group_count: {groups} does not divide both in_features "
                f"{in_features} and out_features {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = window
        self.strides = per_axis("BinaryConv", "strides", strides, rank)
        self.padding = check_padding("BinaryConv", padding)
        self.kernel_dilation = per_axis(
            "BinaryConv", "kernel_dilation", kernel_dilation, rank
        )
        self.feature_group_count = feature_group_count
        super().__init__(
            (*window, in_features // feature_group_count, out_features),
            groups=feature_group_count,
            use_bias=use_bias,
            dropout=dropout,
            input_scale=input_scale,
            rule=rule,
            multiplier=multiplier,
            binary=binary,
            backend=backend,
            dtype=dtype,
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    @property
    def kernel_rank(self) -> int:
        """The rank of one kernel, as `masks.inner_kernels` reads it."""
        return len(self.kernel_size) + 2

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map images `[N, *spatial, C]` to `[N, *out, C_out]`."""
        return self.then(x, relu=False)

    def then(self, x: ArrayLike, *, relu: bool) -> jax.Array:
        """The layer and, where asked, a ReLU behind it, in one pass over memory."""
        x = jnp.asarray(x)
        rank = len(self.kernel_size)
        if x.ndim != rank + 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"BinaryConv: expected [N, {rank} spatial axes, {self.in_features}], "
                f"got shape {x.shape}"
            )
        geometry = conv_geometry(
            "BinaryConv",
            x.shape[1:-1],
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
        )

        box_filter = partial(convolution.mean_pool, geometry=geometry)
        product = partial(training.conv, **geometry.options, groups=self.groups)
        return self._apply(x, geometry, product, box_filter, relu=relu)


class BinaryLinear(_Binary):
    """A dense layer of signs: `K · α · (sign(x) · sign(w)) + bias`.

    `K` is 1, or with `input_scale` the paper's `mean |x|` over the features.

    Args:
      in_features: Features in, `C_in`.
      out_features: Features out, `C_out`.
      use_bias: Whether to add a real bias.
      dropout: Probability in [0, 1) of dropping a sign, in training.
      input_scale: Whether to multiply by `K`.
      rule: The kernel's gradient rule, a name or a function: see `xnor_jax.rules`.
      multiplier: A factor on the rule's gradient.
      binary: False for the float twin.
      backend: What computes the products: `"auto"` takes the compiled library on a
        CPU, and XLA's floats elsewhere; `"float"` takes these everywhere; or another
        of `xnor_jax.ops.available_backends()`. The sums of signs are the same.
      dtype: Of what comes in and goes out; None for that of input and kernel together.
      compute_dtype: Of the operands of the products of signs, float32 or bfloat16. The
        sums are the same integers in both; gradients are rounded to it before they are
        multiplied by signs, and those of signs after it too.
      param_dtype: Of the latent kernel and the bias.
      kernel_init: Initializer of the latent kernel.
      bias_init: Initializer of the bias.
      rngs: Keys `params` and, with dropout, `dropout`.

    Raises:
      ValueError: If `compute_dtype` is another, or not float32 in the float twin.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2.
    """

    kernel_rank = 2  # of one kernel, as `masks.inner_kernels` reads it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dropout: float = 0.0,
        input_scale: bool = False,
        rule: str | Rule = "corrected",
        multiplier: float = 1.0,
        binary: bool = True,
        backend: str = "auto",
        dtype: Dtype | None = None,
        compute_dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        super().__init__(
            (in_features, out_features),
            groups=1,
            use_bias=use_bias,
            dropout=dropout,
            input_scale=input_scale,
            rule=rule,
            multiplier=multiplier,
            binary=binary,
            backend=backend,
            dtype=dtype,
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[..., C_in]` to `[..., C_out]`."""
        return self.then(x, relu=False)

    def then(self, x: ArrayLike, *, relu: bool) -> jax.Array:
        """The layer and, where asked, a ReLU behind it, in one pass over memory."""
        x = jnp.asarray(x)
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"BinaryLinear: expected [..., {self.in_features}], got shape {x.shape}"
            )
        rows = x.reshape(-1, self.in_features)

        def product(rows: jax.Array, kernel: jax.Array, backend: str) -> jax.Array:
            return convolution.dot(rows, kernel)

        y = self._apply(rows, DENSE, product, lambda a: a, relu=relu)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class XnorBlock(nnx.Module):
    """The paper's block: BatchNorm → sign → (dropout) → convolution or dense → ReLU.

    Args:
      in_features: Channels (dense: features) into the product.
      out_features: Channels or features out of it.
      kernel_size: The convolution's window; None for a dense layer.
      norm_features: Channels that BatchNorm sees; None for `in_features`. A dense block
        behind a convolution normalizes the channels, then flattens `[N, H, W, C]`.
      epsilon: BatchNorm's ε.
      momentum: BatchNorm's momentum in Flax's sense.
      relu: Whether a ReLU follows.
      rngs: Keys for the parameters and the dropout.
      **layer: Passed on to `BinaryConv` or `BinaryLinear`.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2 and Table 3: 44.2 % against 30.3 % for the
      usual order.
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
        rngs: nnx.Rngs,
        **layer: Any,
    ):
        self.norm = nnx.BatchNorm(
            norm_features or in_features, momentum=momentum, epsilon=epsilon, rngs=rngs
        )
        # Not asked of the layer: packing puts another in its place.
        self.flatten = kernel_size is None
        if kernel_size is None:
            self.layer = BinaryLinear(in_features, out_features, rngs=rngs, **layer)
        else:
            self.layer = BinaryConv(
                in_features, out_features, kernel_size, rngs=rngs, **layer
            )
        self.relu = relu

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[N, *spatial, C]` to `[N, *out, C_out]`, dense to `[N, C_out]`."""
        # Packing puts a layer without one in its place.
        backend = getattr(self.layer, "backend", "auto")
        x = batch_norm(self.norm, jnp.asarray(x), backend)
        if self.flatten:
            x = x.reshape(x.shape[0], -1)
        if type(self.layer) in (BinaryConv, BinaryLinear):
            return self.layer.then(x, relu=self.relu)
        x = self.layer(x)
        return nnx.relu(x) if self.relu else x
