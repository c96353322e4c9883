"""Flax's BatchNorm with a choice of backend."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from xnor_jax.ops import backends, norm


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` over the last axis, with a choice of backend in training.

    Evaluation, a mask, and an input or parameters of another dtype than float32 use
    Flax's implementation.

    Args:
      num_features: Number of channels, `C`.
      use_running_average: Whether to normalize with the running averages instead of the
        batch's statistics.
      momentum: The decay rate of the running averages, as in Flax.
      epsilon: ε, added to the variance.
      use_bias: Whether to add β.
      use_scale: Whether to multiply by γ.
      param_dtype: The dtype of β and γ.
      bias_init: Initializer of β.
      scale_init: Initializer of γ.
      backend: The backend of the sums: see `BinaryConv`.
      rngs: RNG stream `params`.

    References:
      Ioffe and Szegedy, Batch Normalization, 2015.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        param_dtype: Dtype = jnp.float32,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        scale_init: Initializer = nnx.initializers.ones,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        backends.resolve("BatchNorm", backend, gradient=True)
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            momentum=momentum,
            epsilon=epsilon,
            use_bias=use_bias,
            use_scale=use_scale,
            param_dtype=param_dtype,
            bias_init=bias_init,
            scale_init=scale_init,
            rngs=rngs,
        )
        self.backend = backend

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Map `[N, ..., C]` to the same shape; update the averages in training."""
        x = jnp.asarray(x)
        if x.ndim < 2 or x.shape[-1] != self.num_features:
            raise ValueError(
                f"BatchNorm: expected [N, ..., {self.num_features}], got shape "
                f"{x.shape}"
            )
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if use_running_average is None:
            use_running_average = self.use_running_average
        floats = all(a is None or a.dtype == jnp.float32 for a in (x, scale, bias))
        if use_running_average is not False or mask is not None or not floats:
            return super().__call__(x, use_running_average, mask=mask)
        y, mean, variance = norm.batch_norm(
            x, scale, bias, epsilon=self.epsilon, backend=self.backend
        )
        momentum = float(self.momentum)
        for average, now in ((self.mean, mean), (self.var, variance)):
            average[...] = momentum * average[...] + (1 - momentum) * now
        return y
