r"""Signs of activations, with surrogate gradients.

The sign's own gradient is 0 almost everywhere. A *surrogate* is a function
`(x, grad) -> grad` that replaces it: it maps the loss's gradient at `sign(x)` to the
gradient at `x`, as a rule does for weights (`xnor_jax.rules`). A surrogate receives
both arrays in float32 or wider, and its result is cast to the dtype of `x`. A custom
function can be passed wherever a surrogate's name is accepted:

>>> import jax, jax.numpy as jnp, xnor_jax as xnor
>>> def triangle(x, grad):
...     return grad * jnp.maximum(1 - jnp.abs(x), 0)
>>> jax.grad(lambda x: xnor.quantizers.sign(x, triangle).sum())(jnp.array([0.25, 2.0]))
Array([0.75, 0.  ], dtype=float32)

A function may close over traced values, such as a temperature that follows a schedule
in the training step: `partial(tanh, temperature=t)`. These receive no gradient.

Two signs in a row block the gradient: the first returns ±1, where the `ste` of the
second, strict in `|x| < 1`, is exactly 0. `BinaryConv`, `BinaryLinear` and `XnorBlock`
take the sign of their input themselves. After a separate sign, use `BinaryConv` or
`BinaryLinear` with `surrogate=None`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from xnor_jax import _kernel
from xnor_jax._gradient import transform_gradient
from xnor_jax._kernel import wide_dtype
from xnor_jax.registry import SURROGATES, find

Surrogate = Callable[[jax.Array, jax.Array], jax.Array]


def ste(x: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""Straight-through inside the clipping range: `g · 1[|x| < 1]`.

    Args:
      x: Activations of any shape, floating.
      grad: The loss's gradient at `sign(x)`, of the same shape.

    Returns:
      The gradient for `x`, in the dtype of `grad`.

    Raises:
      ValueError: If the shapes differ.
      TypeError: If one of them is not floating point.

    References:
      Hubara et al., Binarized Neural Networks, 2016; Rastegari et al., XNOR-Net, 2016,
      §3.1.
    """
    wide, g = _wide(x, grad)
    return jnp.where(jnp.abs(wide) < 1, g, 0).astype(jnp.result_type(grad))


def identity(x: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""Straight-through everywhere: `g`.

    Args:
      x: Activations of any shape, floating.
      grad: The loss's gradient at `sign(x)`, of the same shape.

    Returns:
      `grad`.

    Raises:
      ValueError: If the shapes differ.
      TypeError: If one of them is not floating point.

    References:
      Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons,
      2013.
    """
    _wide(x, grad)
    return jnp.asarray(grad)


def approx(x: ArrayLike, grad: ArrayLike) -> jax.Array:
    r"""The slope of a piecewise parabola: `g · (2 − 2|x|) · 1[|x| < 1]`.

    Args:
      x: Activations of any shape, floating.
      grad: The loss's gradient at `sign(x)`, of the same shape.

    Returns:
      The gradient for `x`, in the dtype of `grad`.

    Raises:
      ValueError: If the shapes differ.
      TypeError: If one of them is not floating point.

    References:
      Liu et al., Bi-Real Net, 2018, §3.3.
    """
    wide, g = _wide(x, grad)
    size = jnp.abs(wide)
    return jnp.where(size < 1, g * (2 - 2 * size), 0).astype(jnp.result_type(grad))


def swish(x: ArrayLike, grad: ArrayLike, beta: ArrayLike = 5.0) -> jax.Array:
    r"""The slope of SignSwish: `g · β · (2 − βx·tanh(βx/2)) / (1 + cosh(βx))`.

    Args:
      x: Activations of any shape, floating.
      grad: The loss's gradient at `sign(x)`, of the same shape.
      beta: β, the steepness of the curve; positive; may be traced.

    Returns:
      The gradient for `x`, in the dtype of `grad`.

    Raises:
      ValueError: If β is concrete and not positive.

    References:
      Darabi et al., BNN+: Improved Binary Network Training, 2018, §3.
    """
    wide, g = _wide(x, grad)
    beta = _positive("swish: beta", beta, wide)
    # exp(−y), because cosh(y) overflows. Beyond y = 1000 the slope is 0, but one of its
    # factors may overflow.
    y = jnp.minimum(jnp.abs(beta * wide), 1000)
    power = jnp.exp(-y)
    slope = beta * (2 - y * jnp.tanh(y / 2)) * 2 * power / (1 + power) ** 2
    return (g * slope).astype(jnp.result_type(grad))


def tanh(x: ArrayLike, grad: ArrayLike, temperature: ArrayLike = 1.0) -> jax.Array:
    r"""The slope of a tanh of variable steepness: `g · k·t·(1 − tanh²(t·x))`.

    `k = max(1/t, 1)`. IR-Net's Error Decay Estimator raises t from 0.1 to 10 over
    training: `t = 10^(−1 + 2·progress)`.

    Args:
      x: Activations of any shape, floating.
      grad: The loss's gradient at `sign(x)`, of the same shape.
      temperature: t, positive; may be traced.

    Returns:
      The gradient for `x`, in the dtype of `grad`.

    Raises:
      ValueError: If t is concrete and not positive.

    References:
      Qin et al., Forward and Backward Information Retention for Accurate Binary Neural
      Networks (IR-Net), 2020, §3.3.
    """
    wide, g = _wide(x, grad)
    t = _positive("tanh: temperature", temperature, wide)
    slope = jnp.maximum(1 / t, 1) * t * (1 - jnp.tanh(t * wide) ** 2)
    return (g * slope).astype(jnp.result_type(grad))


def get(surrogate: str | Surrogate) -> Surrogate:
    """Return the surrogate of that name; return a function unchanged.

    Raises:
      ValueError: If no surrogate has that name.
      TypeError: If `surrogate` is neither a name nor callable.
    """
    return find("surrogate", surrogate, SURROGATES, "an (x, grad) -> grad function")


def check(surrogate: Surrogate, x: jax.Array) -> None:
    """Trace `surrogate` on the shape of `x`, so that it fails in the forward pass.

    Raises:
      ValueError: If the surrogate returns anything but one array of that shape.
    """
    wide = jax.ShapeDtypeStruct(x.shape, wide_dtype(x))
    out = jax.eval_shape(surrogate, wide, wide)
    if getattr(out, "shape", None) != x.shape:
        raise ValueError(
            f"the surrogate must return a gradient of the activations' shape {x.shape},"
            f" got {getattr(out, 'shape', out)}"
        )


def sign(x: ArrayLike, surrogate: str | Surrogate = "ste") -> jax.Array:
    """The sign in {−1, +1}, `sign(±0) = +1`, with a surrogate gradient.

    Args:
      x: Activations of any shape, floating.
      surrogate: `"ste"`, `"identity"`, `"approx"`, `"swish"`, `"tanh"`, or a function
        `(x, grad) -> grad`.

    Returns:
      The signs, in the dtype and shape of `x`, as is the gradient.

    Raises:
      ValueError: If the surrogate's name is unknown, or it returns another shape.
      TypeError: If the surrogate is neither a name nor a function.

    Examples:
      >>> import jax, jax.numpy as jnp, xnor_jax as xnor
      >>> x = jnp.array([-1.5, -0.5, 0.0, 1.0])
      >>> jax.grad(lambda x: xnor.quantizers.sign(x, "approx").sum())(x)
      Array([0., 1., 2., 0.], dtype=float32)
    """
    x, function = jnp.asarray(x), get(surrogate)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _kernel.sign(x)
    if function is ste:
        return _sign_ste(x)
    return _sign_identity(with_surrogate(function, x))


def sign_ste(x: ArrayLike) -> jax.Array:
    """Compute `sign(x, "ste")`, whose gradient is `g · 1[|x| < 1]`.

    Args:
      x: Activations of any shape, floating.

    Returns:
      The signs in {−1, +1}, in the dtype and shape of `x`.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1; Hubara et al., 2016.
    """
    return sign(x, "ste")


def with_surrogate(surrogate: Surrogate, x: jax.Array) -> jax.Array:
    """Return `x`; its gradient passes through the surrogate.

    Raises:
      ValueError: If the surrogate returns anything but one array of the shape of `x`.
    """
    if surrogate is identity:
        return x
    check(surrogate, x)

    def narrow(x: jax.Array, g: jax.Array) -> jax.Array:
        return surrogate(*_wide(x, g)).astype(x.dtype)

    return transform_gradient(narrow, x)


@jax.custom_vjp
def _sign_identity(x: jax.Array) -> jax.Array:
    return _kernel.sign(x)


_sign_identity.defvjp(lambda x: (_kernel.sign(x), None), lambda _, g: (g,))


@jax.custom_vjp
def _sign_ste(x: jax.Array) -> jax.Array:
    return _kernel.sign(x)


# The residual is one bool per element, where `with_surrogate` keeps `x`.
_sign_ste.defvjp(
    lambda x: (_kernel.sign(x), jnp.abs(x) < 1),
    lambda inside, g: (jnp.where(inside, g, 0),),
)


def _wide(x: ArrayLike, grad: ArrayLike) -> tuple[jax.Array, jax.Array]:
    x, g = jnp.asarray(x), jnp.asarray(grad)
    if x.shape != g.shape:
        raise ValueError(
            f"expected x and grad of one shape, got {x.shape} and {g.shape}"
        )
    for name, array in (("x", x), ("grad", g)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"expected a floating point {name}, got {array.dtype}")
    dtype = jnp.promote_types(wide_dtype(x), wide_dtype(g))
    return x.astype(dtype), g.astype(dtype)


def _positive(name: str, value: ArrayLike, like: jax.Array) -> jax.Array:
    if not isinstance(value, Tracer):
        numbers = np.asarray(value)
        if not jnp.issubdtype(numbers.dtype, jnp.number):
            raise TypeError(f"{name}: expected a number above 0, got {value!r}")
        if not np.all(numbers > 0):
            raise ValueError(f"{name}: expected a number above 0, got {value}")
    return jnp.asarray(value).astype(like.dtype)
