"""Reference evaluation of a function, with products of signs as integer sums.

A product of signs is `α · n` with the integer sum `n`. In a convolution with
`α · sign(w)`, float rounding may turn an exact 0 into a small number of either sign.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xnor_jax.packing.trace import LOOPS, Const, Interpreter, constant


def reference(function: Callable, params: Any, x: jax.Array) -> np.ndarray:
    """Evaluate `function(params, x)` with each ±α kernel applied as signs, then α.

    Sums of −1, 0 and +1 are exact in floats, so only the multiplication by α rounds.
    The rest of the function is unchanged.

    Args:
      function: A function of parameters and one array that returns one array.
      params: A pytree of arrays.
      x: The array.
    """
    closed = jax.make_jaxpr(function)(params, x)
    leaves = [constant(leaf) for leaf in jax.tree.leaves(params)]

    # Each operation alone: in one program XLA would fuse a product and a sum, whose
    # rounding then hides an exact 0.
    (y,) = _Exact().run(closed, [*leaves, x])
    return np.asarray(_array(y))


class _Exact(Interpreter):
    """Evaluates each equation by JAX, and products of signs as such."""

    def apply(self, equation, ins, scope, line):
        name = equation.primitive.name
        if name in LOOPS:
            # Unrolled, as in the packed network, for the products in its body.
            return self.unroll(equation, ins, scope, line)
        return _PRODUCT_RULES.get(name, _bind)(equation, ins)

    def row(self, value, at, scope, line):
        return value[at]

    def stack(self, values, aval, scope, line):
        return jnp.stack([_array(v) for v in values])


def _array(value: Any) -> Any:
    return value.array() if isinstance(value, Const) else value


def _bind(equation: Any, ins: Sequence[Any]) -> list[Any]:
    outs = equation.primitive.bind(*map(_array, ins), **equation.params)
    return outs if equation.primitive.multiple_results else [outs]


def _conv(equation: Any, ins: Sequence[Any]) -> list[Any]:
    numbers = equation.params["dimension_numbers"]
    x, kernel = ins
    channels = numbers.rhs_spec[0]
    found = _signs(kernel, [d for d in range(len(kernel.shape)) if d != channels])
    if found is None:
        return _bind(equation, ins)
    signs, scale = found
    (y,) = _bind(equation, [x, signs])
    shape = [1] * y.ndim
    shape[numbers.out_spec[1]] = -1
    return [y * scale.reshape(shape)]


def _dot(equation: Any, ins: Sequence[Any]) -> list[Any]:
    contracted, batch = equation.params["dimension_numbers"]
    operands = list(ins)
    for at in (0, 1):
        found = None if any(batch) else _signs(ins[at], contracted[at])
        if found is not None:
            operands[at], scale = found
            (y,) = _bind(equation, operands)
            # The right operand's free axes are the last axes of the result.
            after = y.ndim - scale.ndim if at == 0 else 0
            return [y * scale.reshape((*scale.shape, *(1,) * after))]
    return _bind(equation, ins)


_PRODUCT_RULES = {"conv_general_dilated": _conv, "dot_general": _dot}


def _signs(kernel: Any, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """The signs and α of a kernel that is ±α along `axes`; else None."""
    if not isinstance(kernel, Const) or not np.issubdtype(kernel.dtype, np.floating):
        return None
    numbers = kernel.full()
    magnitudes, axes = np.abs(numbers), tuple(axes)
    scale = magnitudes.max(axes, keepdims=True, initial=0)
    mixed = (numbers > 0).any() and (numbers < 0).any()  # excludes box filters
    if not mixed or not (magnitudes == scale).all():
        return None
    signs = np.where(numbers >= 0, 1, -1).astype(numbers.dtype)
    return signs, scale.squeeze(axes)
