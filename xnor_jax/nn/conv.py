"""Flax's convolution with a choice of backend."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from xnor_jax.geometry import (
    Padding,
    check_features,
    check_padding,
    conv_geometry,
    kernel_window,
    per_axis,
)
from xnor_jax.ops import backends, training


class Conv(nnx.Conv):
    """`nnx.Conv` with a choice of backend: `x ⊛ w + bias`.

    Args:
      in_features: Input channels, `C`.
      out_features: Output channels, `C_out`.
      kernel_size: The window, one number per spatial axis; one number for rank 1.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      kernel_dilation: One number, or one per spatial axis.
      feature_group_count: Number of groups; the kernel is `[*window, C/groups, C_out]`.
      use_bias: Whether to add a bias.
      dtype: The dtype of the result; None infers it from the input and parameters.
      param_dtype: The dtype of kernel and bias.
      kernel_init: Initializer of the kernel.
      bias_init: Initializer of the bias.
      backend: The backend of the product and its gradients: see `BinaryConv`.
      rngs: RNG stream `params`.

    Raises:
      ValueError: If the groups do not divide the channels, or the window has not 1 to 3
        axes of at least 1; when called, if the window does not fit or the backend does
        not support the convolution.
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
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        check_features("Conv", in_features, out_features, groups=feature_group_count)
        backends.resolve("Conv", backend, gradient=True)
        super().__init__(
            in_features,
            out_features,
            kernel_window("Conv", kernel_size),
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.backend = backend

    def __call__(self, inputs: ArrayLike) -> jax.Array:  # type: ignore[override]
        """Map images `[..., *spatial, C]` to `[..., *out, C_out]`."""
        x, kernel = jnp.asarray(inputs), self.kernel[...]
        rank = len(self.kernel_size)
        if x.ndim < rank + 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Conv: expected [..., {rank} spatial axes, {self.in_features}], got "
                f"shape {x.shape}"
            )
        bias = None if self.bias is None else self.bias[...]
        parameters = [kernel] if bias is None else [kernel, bias]
        dtype = self.dtype or jnp.result_type(x, *parameters)
        images = x.astype(dtype)
        if x.ndim != rank + 2:
            images = images.reshape(-1, *x.shape[-rank - 1 :])
        geometry = conv_geometry(
            "Conv",
            images.shape[1:-1],
            self.kernel_size,
            strides=per_axis("Conv", "strides", self.strides, rank),
            padding=check_padding("Conv", self.padding),
            dilation=per_axis("Conv", "kernel_dilation", self.kernel_dilation, rank),
        )
        y = training.conv(
            images,
            kernel.astype(dtype),
            None if bias is None else bias.astype(dtype),
            **geometry.options,
            groups=self.feature_group_count,
            backend=self.backend,
        )
        return (
            y if x.ndim == rank + 2 else y.reshape(*x.shape[: -rank - 1], *y.shape[1:])
        )
