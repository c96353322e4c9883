"""The elementwise functions that a packed network can contain, by name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_UNARY: dict[str, Callable[..., jax.Array]] = {
    "neg": jnp.negative,
    "abs": jnp.abs,
    "sign": jnp.sign,
    "floor": jnp.floor,
    "ceil": jnp.ceil,
    "round": jnp.round,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "log": jnp.log,
    "log1p": jnp.log1p,
    "tanh": jnp.tanh,
    "logistic": jax.nn.sigmoid,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": jnp.tan,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "cbrt": jnp.cbrt,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "square": jnp.square,
    "integer_pow": lax.integer_pow,
    "to_float": lambda x: x.astype(jnp.float32),
    "is_finite": jnp.isfinite,
    "not": jnp.logical_not,
}
_BINARY: dict[str, Callable[..., jax.Array]] = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": jnp.divide,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "rem": lambda a, b: lax.rem(*jnp.broadcast_arrays(a, b)),
    "pow": jnp.power,
    "atan2": jnp.arctan2,
    "ge": jnp.greater_equal,
    "gt": jnp.greater,
    "le": jnp.less_equal,
    "lt": jnp.less,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "xor": jnp.logical_xor,
}
_TERNARY: dict[str, Callable[..., jax.Array]] = {
    "clamp": lambda low, x, high: jnp.minimum(jnp.maximum(x, low), high),
    "select": lambda which, if_false, if_true: jnp.where(which, if_true, if_false),
}
# Functions of floats, except `LOGICAL`, "to_float" and the condition of "select".
FUNCTIONS = _UNARY | _BINARY | _TERNARY
ARITIES = {
    name: arity
    for arity, group in enumerate((_UNARY, _BINARY, _TERNARY), start=1)
    for name in group
}
COMPARISONS = ("ge", "gt", "le", "lt")
LOGICAL = ("not", "and", "or", "xor")
# Functions whose result is bool.
PREDICATES = (*COMPARISONS, *LOGICAL, "eq", "ne", "is_finite")


def apply_function(name: str, args: Sequence[Any], exponent: int = 0) -> jax.Array:
    """Apply one of `FUNCTIONS`; `exponent` is for `integer_pow` alone."""
    if name == "integer_pow":
        return lax.integer_pow(args[0], exponent)
    return FUNCTIONS[name](*args)
