"""Products with gradients: what a training step runs.

On a CPU the compiled library takes them where it can: two or fewer spatial axes, one
group, float32. Elsewhere they are XLA's, in the formulations of `convolution.py`. Both
give the same integers, and the same floats to rounding.

A product of signs is one of bits going forward. What it keeps of its input are words of
signs, and of where the gradient passes: two bits. Going back it is one of floats.
Where these are of bfloat16, the library rounds as a GPU would: a run's numbers do not
hang on where it runs.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from xnor_jax import convolution
from xnor_jax._kernel import scale, sign, wide_dtype
from xnor_jax.geometry import DENSE, Geometry, Padding, conv_geometry
from xnor_jax.ops import backends, cpu, narrow
from xnor_jax.ops._mesh import over_images
from xnor_jax.ops.bits import WORD, unpack_negative, words_for
from xnor_jax.ops.cpu import steps
from xnor_jax.ops.epilogue import Affine, Sums
from xnor_jax.ops.gradients import input_gradient
from xnor_jax.ops.kernel import pack_kernel
from xnor_jax.quantizers import sign_ste


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
      ValueError: If the geometry does not fit.
    """
    geometry = conv_geometry(
        "conv",
        x.shape[1:-1],
        kernel.shape[:-2],
        strides=strides,
        padding=padding,
        dilation=dilation,
    )

    def plain(x, kernel, bias):
        options = {**geometry.options, "groups": groups, "accumulator": accumulator}
        y = convolution.conv(x, kernel, **options)
        return y if bias is None else y + bias.astype(y.dtype)

    if accumulator not in (None, x.dtype) or not _compiles(x, geometry, groups):
        return plain(x, kernel, bias)
    backend = backends.resolve("conv", backend, len(geometry.window), gradient=True)
    x = cpu.vary_as(x, kernel)  # As in `binary_product`.
    kernel = cpu.vary_as(kernel, x)
    bias = None if bias is None else cpu.vary_as(bias, x)
    return backends.choose(backend, partial(_conv, geometry), plain, x, kernel, bias)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    preferred_element_type: Any = None,
    dimension_numbers: Any = None,
    backend: str = "auto",
    **options: Any,
) -> jax.Array:
    """`conv` in the clothes of `jax.lax`, for `nnx.Conv(conv_general_dilated=…)`.

    Raises:
      ValueError: For an option that `conv` has not, such as a dilated input, or
        dimensions that have not the channels last.
    """
    if dimension_numbers is not None:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        last = lhs.ndim - 1
        channels_last = (0, last, *range(1, last))
        kernel_last = (last, last - 1, *range(last - 1))
        if tuple(numbers) != (channels_last, kernel_last, channels_last):
            raise ValueError(
                "conv: expected channels last in dimension_numbers, got "
                f"{dimension_numbers}"
            )
    for name, option in options.items():
        if option is not None:
            raise ValueError(f"conv: {name} is not supported, got {option!r}")
    unit = (1,) * (rhs.ndim - 2)
    if lhs_dilation is not None and any(d != 1 for d in lhs_dilation):
        raise ValueError(f"conv: expected no input dilation, got {lhs_dilation}")
    return conv(
        lhs,
        rhs,
        strides=window_strides,
        padding=padding,
        dilation=rhs_dilation or unit,
        groups=feature_group_count,
        accumulator=preferred_element_type,
        backend=backend,
    )


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
    compute_dtype: DTypeLike = jnp.float32,
    backend: str = "auto",
) -> jax.Array:
    """`α · (sign(x) ⊛ sign(w̃)) + bias`, for `w̃ = α·sign(w)`, and its gradient.

    The sums are of integers, hence exact. The gradient is that of `s ⊛ w̃ + bias` at
    the signs `s`; from them to `x` it passes where `|x| < 1`.

    Args:
      x: Activations `[N, *spatial, C]`; their signs are taken.
      kernel: `w̃`, `[*window, C / groups, C_out]`, in the dtype of the latent kernel.
      bias: `[C_out]`, or None.
      keep: Under dropout, the signs that stay: bool, as `x`. The others are 0.
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: How many groups the channels fall into.
      keep_rate: The share of signs that stay, in (0, 1]; what stays is divided by it.
      relu: Whether a ReLU follows.
      compute_dtype: Of the products' operands, where it is narrower than float32 and
        than that of `x`: the sums stay the same integers, and gradients are rounded to
        it before they are multiplied by signs, that of `x` after it too.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA's floats;
        others have no gradients.

    Returns:
      `[N, *out, C_out]`, in the dtype of `x`.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1 and §3.2.
    """
    backend = backends.resolve(
        "binary_product", backend, len(geometry.window), gradient=True
    )
    narrower = jnp.finfo(compute_dtype).bits < min(32, jnp.finfo(x.dtype).bits)
    dtype = jnp.dtype(compute_dtype) if narrower else None
    plain = partial(_in_floats, geometry, groups, keep_rate, relu, dtype)
    # In `shard_map`, so that JAX and not the gradients below sums what is the same on
    # all devices: a branch for a platform forgets that it is.
    x = cpu.vary_as(x, kernel)
    kernel = cpu.vary_as(kernel, x)
    bias = None if bias is None else cpu.vary_as(bias, x)
    args = (x, kernel, bias, keep)
    if kernel.dtype != jnp.float32 or not _compiles(x, geometry, groups):
        return plain(*args)
    on_bits = partial(_on_bits, geometry, keep_rate, relu, dtype)
    return backends.choose(backend, on_bits, plain, *args)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled_product(
    product: Callable[..., jax.Array], signs: jax.Array, binary_kernel: jax.Array
) -> jax.Array:
    """`product(signs, w̃)` for `w̃ = α·sign(w)`, as `α · product(signs, sign(w))`.

    The sums are of integers, hence exact; the gradient is that of `product(signs, w̃)`.

    Args:
      product: `(x, kernel, *, accumulator) -> y`, linear in both.
      signs: Activations in {−1, 0, +1}.
      binary_kernel: `α · sign(w)`, `[..., C_in, C_out]`, in the dtype of the latent
        kernel: a narrower one may have no room for α.

    Returns:
      The product, `[..., C_out]`, in the dtype of `signs`.
    """
    kernel_signs = sign(binary_kernel).astype(signs.dtype)
    sums = product(signs, kernel_signs, accumulator=wide_dtype(signs))
    return (scale(binary_kernel).astype(sums.dtype) * sums).astype(signs.dtype)


def _scaled_product_fwd(product, signs, binary_kernel):
    return scaled_product(product, signs, binary_kernel), (signs, binary_kernel)


def _scaled_product_bwd(product, residuals, g):
    def narrow(signs, binary_kernel):
        return product(signs, binary_kernel.astype(signs.dtype))

    return jax.vjp(narrow, *residuals)[1](g)


scaled_product.defvjp(_scaled_product_fwd, _scaled_product_bwd)


def _in_floats(geometry, groups, keep_rate, relu, dtype, x, kernel, bias, keep):
    signs = jnp.asarray(sign_ste(x))
    if keep is not None:
        signs, kernel = jnp.where(keep, signs, 0), kernel / keep_rate
    if dtype is not None:
        product = partial(narrow.scaled_product, geometry, groups, dtype)
    elif geometry == DENSE:
        product = partial(scaled_product, convolution.dot)
    else:
        conv = partial(convolution.conv, groups=groups, **geometry.options)
        product = partial(scaled_product, conv)
    y = jnp.asarray(product(signs, kernel))
    y = y if bias is None else y + bias.astype(y.dtype)
    return jax.nn.relu(y) if relu else y


# On bits, by the compiled library.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _on_bits(geometry, keep_rate, relu, dtype, x, kernel, bias, keep):
    return _on_bits_fwd(geometry, keep_rate, relu, dtype, x, kernel, bias, keep)[0]


def _on_bits_fwd(geometry, keep_rate, relu, dtype, x, kernel, bias, keep):
    packed, alpha = pack_kernel(kernel), scale(kernel)
    shift = jnp.zeros_like(alpha) if bias is None else bias

    def run(words, epilogue, dtype):
        step = steps.conv(packed, epilogue, **geometry.options)
        return cpu.run(words, [step], geometry.out, packed.out_features, dtype)

    words, outside, others = _planes(geometry, x, keep)
    if keep is None:
        y = run(words, Affine(alpha, shift, relu), jnp.float32)
    else:
        # {−1, 0, +1} is the mean of two signs that differ where it is 0.
        sums = run(words, Sums(), jnp.int32) + run(others, Sums(), jnp.int32)
        y = (alpha / (2 * keep_rate)) * sums.astype(alpha.dtype) + shift
        y = jax.nn.relu(y) if relu else y
    residuals = words, others, outside, kernel, bias, y if relu else None
    return y, residuals


def _planes(geometry, x, keep):
    """Words of the signs, of where the gradient does not pass, of the other signs.

    Flags in a byte a number, and not the words at once: so XLA computes them where it
    computes `x`, such as BatchNorm's result, which then is never in memory.
    """
    negative = ~(x >= 0)  # of NaN too, as `sign` has it
    flags = [negative, ~(jnp.abs(x) < 1)]
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
    words, outside, *others = jnp.split(planes, len(flags), axis=-1)
    return words, outside, others[0] if others else words


def _on_bits_bwd(geometry, keep_rate, relu, dtype, residuals, g):
    words, others, outside, kernel, bias, y = residuals
    if relu:
        g = jnp.where(y > 0, g, 0)
    d_bias = _bias_gradient(g, bias)
    plain, scaled, factor = g, g, kernel / keep_rate
    if dtype is not None:
        plain = narrow.rounded(g, dtype)
        scaled, factor = narrow.rounded(scale(factor) * g, dtype), sign(kernel)
    options = {"shape": kernel.shape, **geometry.options}
    d_kernel = cpu.kernel_gradient(words, others, plain, **options) / keep_rate
    d_x = input_gradient(geometry, scaled, factor)
    if dtype is not None:
        d_x = narrow.rounded(d_x, dtype)
    # Nor does it pass what was dropped.
    blocked = unpack_negative(outside | (words ^ others), d_x.shape[-1])
    return jnp.where(blocked, 0, d_x), d_kernel, d_bias, None


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


def _compiles(x, geometry, groups):
    known = cpu.is_available() and len(geometry.window) <= cpu.RANK and groups == 1
    return known and x.dtype == jnp.float32 and x.size > 0
