"""Reference evaluation of a function, with products of signs as integer sums.

A product of signs is `α · n` with the integer sum `n`. In a convolution with
`α · sign(w)`, float rounding may turn an exact 0 into a small number of either sign.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from xnor_jax.packing.trace import CALLS, LOOPS, Const, constant, evaluated, stacked


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
    consts = [constant(c) for c in closed.consts]
    leaves = [constant(leaf) for leaf in jax.tree.leaves(params)]

    def of_input(x):
        (y,) = _run(closed.jaxpr, consts, [*leaves, x])
        return _array(y)

    # Constants stay arguments of the program: folding them may change the rounding.
    exact = jax.make_jaxpr(of_input)(x)

    @jax.jit
    def run(consts, x):
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(exact.jaxpr, consts))(x)

    return np.asarray(run(exact.consts, x)[0])


def _run(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Run a jaxpr on tracers and constants; equations of constants are evaluated."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(var: Any) -> Any:
        if not isinstance(var, jex.Literal):
            return env[var]
        aval: Any = var.aval
        return constant(np.asarray(var.val, aval.dtype))

    for equation in jaxpr.eqns:
        ins, name = [read(v) for v in equation.invars], equation.primitive.name
        if name in CALLS:
            outs = _call(equation.params[CALLS[name]], ins)
        elif name == "cond" and isinstance(ins[0], Const):
            branches = equation.params["branches"]
            at = int(np.clip(int(ins[0].value), 0, len(branches) - 1))
            outs = _call(branches[at], ins[1:])
        elif all(isinstance(i, Const) for i in ins):
            outs = evaluated(equation, ins)
        elif name in LOOPS:
            # Unrolled, as in the packed network, for the products in its body.
            outs = LOOPS[name](equation, ins, _call, _row, _stacked)
        else:
            rule = _PRODUCT_RULES.get(name, _bind)
            outs = rule(equation, ins)
        env |= dict(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _call(program: Any, ins: Sequence[Any], at: int = 0) -> list[Any]:
    consts = [constant(c) for c in getattr(program, "consts", ())]
    return _run(getattr(program, "jaxpr", program), consts, ins)


def _row(value: Any, at: int) -> Any:
    return constant(value.full()[at]) if isinstance(value, Const) else value[at]


def _stacked(values: Sequence[Any], aval: Any) -> Any:
    if all(isinstance(v, Const) for v in values):
        return stacked(values, aval)
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
            return [y * scale.reshape(*scale.shape, *(1,) * after)]
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
