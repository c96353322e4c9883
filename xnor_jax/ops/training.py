"""Products with gradients: what a training step runs.

On a CPU the compiled library takes them where it can: two or fewer spatial axes, one
group, float32. Elsewhere they are XLA's, in the formulations of `convolution.py`. Both
give the same integers, and the same floats to rounding.

A product of signs is one of bits going forward. Of its input it keeps words of signs,
and with the surrogate `ste` of where the gradient passes: one bit or two. Any other
surrogate than `identity` keeps the input. Going back it is one of floats.
Where these are of bfloat16, the library rounds as a GPU would: a run's numbers do not
hang on where it runs.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from xnor_jax import convolution, quantizers, rules
from xnor_jax._gradient import transform_gradient
from xnor_jax._kernel import scale, sign
from xnor_jax.geometry import Geometry, Padding, conv_geometry
from xnor_jax.ops import backends, cpu
from xnor_jax.ops._mesh import over_images
from xnor_jax.ops.bits import WORD, unpack_negative, words_for
from xnor_jax.ops.cpu import steps
from xnor_jax.ops.epilogue import Affine, Sums
from xnor_jax.ops.gradients import input_gradient
from xnor_jax.ops.kernel import pack_kernel
from xnor_jax.ops.scaled import rounded, scaled_product
from xnor_jax.quantizers import Surrogate
from xnor_jax.rules import Rule


@over_images
def conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    accumulator: Any = None,
    backend: str = "auto",
) -> jax.Array:
    """A convolution of floats, rank 1 to 3, channels last: `x ⊛ w + bias`.

    Differentiable in reverse mode only.

    Args:
      x: Images, `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`, in the dtype of `x`.
      bias: `[C_out]`, in the dtype of `x`, or None.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      dilation: Of the kernel; one number, or one per spatial axis.
      groups: How many groups the channels fall into.
      accumulator: The dtype of the sums and of the result; None for that of `x`.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA's; others
        have no gradients.

    Returns:
      `[N, *out, C_out]`.

    Raises:
      ValueError: If the geometry does not fit, or the backend cannot do it.
    """
    geometry = conv_geometry(
        "conv",
        x.shape[1:-1],
        kernel.shape[:-2],
        strides=strides,
        padding=padding,
        dilation=dilation,
    )

    def portable(x, kernel, bias):
        options = {**geometry.options, "groups": groups, "accumulator": accumulator}
        y = convolution.conv(x, kernel, **options)
        return y if bias is None else y + bias.astype(y.dtype)

    backend = backends.resolve("conv", backend, len(geometry.window), gradient=True)
    known = kernel.dtype == jnp.float32 and accumulator in (None, x.dtype)
    if not _compiles("conv", backend, x, geometry, groups, known=known):
        return portable(x, kernel, bias)
    x = cpu.vary_as(x, kernel)  # As in `binary_product`.
    kernel = cpu.vary_as(kernel, x)
    bias = None if bias is None else cpu.vary_as(bias, x)
    return backends.choose(backend, partial(_conv, geometry), portable, x, kernel, bias)


@over_images
def binary_product(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    keep: jax.Array | None = None,
    *,
    geometry: Geometry,
    groups: int = 1,
    keep_rate: float = 1.0,
    relu: bool = False,
    rule: str | Rule = "corrected",
    multiplier: ArrayLike = 1.0,
    surrogate: str | Surrogate | None = "ste",
    compute_dtype: DTypeLike = jnp.float32,
    backend: str = "auto",
) -> jax.Array:
    """`α · (sign(x) ⊛ sign(w)) + bias` of a latent kernel `w`, and its gradient.

    The sums are of integers, hence exact. The gradient is that of `s ⊛ w̃ + bias` at the
    signs `s` and at `w̃ = α·sign(w)`; from them to `x` it passes through the surrogate,
    and to `w` through the rule.

    Args:
      x: Activations `[N, *spatial, C]`; their signs are taken.
      kernel: `w`, `[*window, C / groups, C_out]`.
      bias: `[C_out]`, or None.
      keep: Under dropout, the signs that stay: bool, as `x`. The others are 0.
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: How many groups the channels fall into.
      keep_rate: The share of signs that stay, in (0, 1]; what stays is divided by it.
      relu: Whether a ReLU follows.
      rule: The kernel's gradient rule, a name or a function: see `xnor_jax.rules`.
      multiplier: A factor on the rule's gradient.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`;
        None for `"identity"`.
      compute_dtype: Of the products' operands, where it is narrower than float32 and
        than that of `x`: the sums stay the same integers, and gradients are rounded to
        it before they are multiplied by signs, that of the signs after it too.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA's floats;
        others have no gradients.

    Returns:
      `[N, *out, C_out]`, in the dtype of `x`.

    Raises:
      ValueError: If there is no such backend, rule or surrogate, or one of these does
        not fit shapes, groups or dtypes.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1 and §3.2.
    """
    backend = backends.resolve(
        "binary_product", backend, len(geometry.window), gradient=True
    )
    narrower = jnp.finfo(compute_dtype).bits < min(32, jnp.finfo(x.dtype).bits)
    dtype = jnp.dtype(compute_dtype) if narrower else None
    function = quantizers.get("identity" if surrogate is None else surrogate)
    clipped = function is quantizers.ste
    x = x if clipped else quantizers.with_surrogate(function, x)
    kernel = _with_rule(rule, multiplier, kernel)
    # In `shard_map`, so that JAX and not the gradients below sums what is the same on
    # all devices: a branch for a platform forgets that it is.
    x = cpu.vary_as(x, kernel)
    kernel = cpu.vary_as(kernel, x)
    bias = None if bias is None else cpu.vary_as(bias, x)
    args = (x, kernel, bias, keep)
    portable = partial(_in_floats, geometry, groups, keep_rate, relu, dtype, clipped)
    known = kernel.dtype == jnp.float32
    if not _compiles("binary_product", backend, x, geometry, groups, known=known):
        return portable(*args)
    on_bits = partial(_on_bits, geometry, keep_rate, relu, dtype, clipped)
    return backends.choose(backend, on_bits, portable, *args)


def _with_rule(rule, multiplier, kernel):
    """The kernel itself, whose gradient, that at `w̃`, goes through the rule.

    Outside of the products, so that a rule is given the sum over devices and uses of
    one program, and not each part of it.
    """
    function = rules.get(rule)
    rules.check(function, kernel)

    def latent(kernel, g):
        return rules.scaled(function, kernel, g, multiplier).astype(kernel.dtype)

    return transform_gradient(latent, kernel)


def _in_floats(
    geometry, groups, keep_rate, relu, dtype, clipped, x, kernel, bias, keep
):
    signs = quantizers.sign(x, "ste" if clipped else "identity")
    if keep is not None:
        signs = jnp.where(keep, signs, 0)
    product = scaled_product(geometry, groups, keep_rate, dtype, signs, kernel)
    y = cast(jax.Array, product)  # `partial` loses what `custom_vjp` returns
    y = y if bias is None else y + bias.astype(y.dtype)
    return jax.nn.relu(y) if relu else y


# On bits, by the compiled library.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _on_bits(geometry, keep_rate, relu, dtype, clipped, x, kernel, bias, keep):
    settings = geometry, keep_rate, relu, dtype, clipped
    return _on_bits_fwd(*settings, x, kernel, bias, keep)[0]


def _on_bits_fwd(geometry, keep_rate, relu, dtype, clipped, x, kernel, bias, keep):
    packed, alpha = pack_kernel(kernel), scale(kernel)
    shift = jnp.zeros_like(alpha) if bias is None else bias

    def run(words, epilogue, dtype):
        step = steps.conv(packed, epilogue, **geometry.options)
        return cpu.run(words, [step], geometry.out, packed.out_features, dtype)

    words, outside, others = _planes(geometry, clipped, x, keep)
    if others is None:
        y = run(words, Affine(alpha, shift, relu), jnp.float32)
    else:
        # {−1, 0, +1} is the mean of two signs that differ where it is 0.
        sums = run(words, Sums(), jnp.int32) + run(others, Sums(), jnp.int32)
        y = (alpha / (2 * keep_rate)) * sums.astype(alpha.dtype) + shift
        y = jax.nn.relu(y) if relu else y
    residuals = words, others, outside, kernel, alpha, bias, y if relu else None
    return y, residuals


def _planes(geometry, clipped, x, keep):
    """Words of the signs, of where the gradient does not pass, of the other signs.

    None for those that are not needed. Flags in a byte a number, and not the words at
    once: so XLA computes them where it computes `x`, such as BatchNorm's result, which
    then is never in memory.
    """
    negative = ~(x >= 0)  # of NaN too, as `sign` has it
    flags = [negative]
    if clipped:
        flags.append(~(jnp.abs(x) < 1))
    if keep is not None:
        flags.append(negative ^ ~keep)
    weights = [flag.astype(jnp.uint8) << at for at, flag in enumerate(flags)]
    step, bits = steps.pack_flags(len(flags)), WORD * words_for(x.shape[-1])
    planes = cpu.run(
        reduce(jnp.bitwise_or, weights),
        [step],
        geometry.spatial,
        len(flags) * bits,
        jnp.uint32,
    )
    words, *more = jnp.split(planes, len(flags), axis=-1)
    outside = more.pop(0) if clipped else None
    return words, outside, more[0] if more else None


def _on_bits_bwd(geometry, keep_rate, relu, dtype, clipped, residuals, g):
    words, others, outside, kernel, alpha, bias, y = residuals
    if relu:
        g = jnp.where(y > 0, g, 0)
    d_bias = _bias_gradient(g, bias)
    alpha, signs = alpha / keep_rate, sign(kernel)
    unscaled, scaled, factor = g, g, alpha * signs
    if dtype is not None:
        unscaled, scaled, factor = rounded(g, dtype), rounded(alpha * g, dtype), signs
    options = {"shape": kernel.shape, **geometry.options}
    # Nothing passes where `ste` clips, nor to what was dropped.
    blocked = [] if outside is None else [outside]
    if others is None:
        others = words
    else:
        blocked.append(words ^ others)
    d_kernel = cpu.kernel_gradient(words, others, unscaled, **options) / keep_rate
    d_x = input_gradient(geometry, scaled, factor)
    if dtype is not None:
        d_x = rounded(d_x, dtype)
    if blocked:
        planes = reduce(jnp.bitwise_or, blocked)
        d_x = jnp.where(unpack_negative(planes, d_x.shape[-1]), 0, d_x)
    return d_x, d_kernel, d_bias, None


_on_bits.defvjp(_on_bits_fwd, _on_bits_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(geometry, x, kernel, bias):
    epilogue = Sums() if bias is None else Affine(jnp.ones_like(bias), bias)
    step = steps.real_conv(kernel, epilogue, **geometry.options)
    return cpu.run(x, [step], geometry.out, kernel.shape[-1], jnp.float32)


def _conv_fwd(geometry, x, kernel, bias):
    return _conv(geometry, x, kernel, bias), (x, kernel, bias)


def _conv_bwd(geometry, residuals, g):
    x, kernel, bias = residuals
    d_kernel = cpu.kernel_gradient(x, x, g, kernel.shape, **geometry.options)
    return input_gradient(geometry, g, kernel), d_kernel, _bias_gradient(g, bias)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _bias_gradient(g, bias):
    # The sums of g · g are for nothing, but quicker than XLA's sums of g alone.
    return None if bias is None else cpu.channel_sums(g, g, jnp.zeros_like(bias))[0]


def _compiles(where, backend, x, geometry, groups, *, known):
    """Whether the compiled library takes it; refused if asked for by name in vain."""
    one = groups == 1 and x.dtype == jnp.float32 and known
    if backend == "cpu" and not one:
        raise ValueError(
            f"{where}: the backend 'cpu' trains one group of float32 numbers, got "
            f"feature_group_count={groups} and {x.dtype}; use 'auto' or 'float'"
        )
    fits = len(geometry.window) <= cpu.RANK and x.size > 0
    return cpu.is_available() and one and fits
