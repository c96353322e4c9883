"""Activations with learned parameters, one value per channel."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from xnor_jax import quantizers
from xnor_jax._kernel import check_real
from xnor_jax.geometry import positive
from xnor_jax.quantizers import Surrogate

_QUARTER = nnx.initializers.constant(0.25)


class RSign(nnx.Module):
    """A sign with a learned threshold: `sign(x − β)`, with one β per channel.

    The gradient of β is the negative surrogate gradient, summed over the channel. Use
    `surrogate=None` in a binary layer that follows: see `BinaryConv`.

    Args:
      num_features: Number of channels, `C`.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`.
      dtype: The dtype of the result; None infers it from the input and β.
      param_dtype: The dtype of β.
      beta_init: Initializer of β.
      rngs: RNG stream `params`.

    Raises:
      ValueError: If the surrogate's name is unknown or `num_features` is not positive;
        when called, if the input has another number of channels.
      TypeError: If the surrogate is neither a name nor a function; when called, if the
        input is boolean or complex.

    References:
      Liu et al., ReActNet, 2020, §4.2.
    """

    def __init__(
        self,
        num_features: int,
        *,
        surrogate: str | Surrogate = "ste",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        beta_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        positive("RSign", "num_features", num_features)
        quantizers.get(surrogate)
        self.beta = nnx.Param(beta_init(rngs.params(), (num_features,), param_dtype))
        self.surrogate = surrogate
        self.dtype = dtype

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[..., C]` to signs `[..., C]`."""
        x, (beta,) = _cast("RSign", x, self.dtype, self.beta)
        return quantizers.sign(x - beta, self.surrogate)


class RPReLU(nnx.Module):
    """A PReLU with learned shifts: `x − γ + ζ` where `x > γ`, else `b·(x − γ) + ζ`.

    Args:
      num_features: Number of channels, `C`; γ, ζ and b have one value per channel.
      dtype: The dtype of the result; None infers it from the input and parameters.
      param_dtype: The dtype of γ, ζ and b.
      gamma_init: Initializer of γ, the shift of the input.
      zeta_init: Initializer of ζ, the shift of the output.
      slope_init: Initializer of b, the slope below γ.
      rngs: RNG stream `params`.

    Raises:
      ValueError: If `num_features` is not positive; when called, if the input has
        another number of channels.
      TypeError: When called, if the input is boolean or complex.

    References:
      Liu et al., ReActNet, 2020, §4.2.
    """

    def __init__(
        self,
        num_features: int,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        gamma_init: Initializer = nnx.initializers.zeros_init(),
        zeta_init: Initializer = nnx.initializers.zeros_init(),
        slope_init: Initializer = _QUARTER,
        rngs: nnx.Rngs,
    ):
        positive("RPReLU", "num_features", num_features)

        def param(init: Initializer) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (num_features,), param_dtype))

        self.gamma = param(gamma_init)
        self.zeta = param(zeta_init)
        self.slope = param(slope_init)
        self.dtype = dtype

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[..., C]` to `[..., C]`."""
        parameters = self.gamma, self.zeta, self.slope
        x, (gamma, zeta, slope) = _cast("RPReLU", x, self.dtype, *parameters)
        x = x - gamma
        return jnp.where(x > 0, x, slope * x) + zeta


def _cast(
    where: str, x: ArrayLike, dtype: Dtype | None, *parameters: nnx.Param
) -> tuple[jax.Array, list[jax.Array]]:
    x, values = jnp.asarray(x), [parameter[...] for parameter in parameters]
    check_real(where, x)
    if x.shape[-1:] != values[0].shape:
        raise ValueError(
            f"{where}: expected [..., {values[0].size}], got shape {x.shape}"
        )
    dtype = dtype or jnp.result_type(x, *values)
    return x.astype(dtype), [value.astype(dtype) for value in values]
