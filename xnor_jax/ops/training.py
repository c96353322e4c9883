"""Products with gradients, for training.

On a CPU the compiled library computes products with at most two spatial axes, one group
and float32 arrays. XLA computes all others, in the formulations of `convolution.py`.
Both give identical integers, and floats that agree up to rounding.

In the library, the forward pass of a product of signs multiplies bits. Its residuals
are the signs of the input and, with the surrogate `ste`, a mask of where the gradient
passes: one or two bits per activation, and one more under dropout. Surrogates other
than `ste` and `identity` also store the input. The backward pass multiplies floats.
With bfloat16 operands the library rounds as a GPU does, so that rounding does not
depend on the platform.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from xnor_jax import convolution, quantizers, rules
from xnor_jax._kernel import scale, sign
from xnor_jax.geometry import Geometry, Padding, conv_geometry
from xnor_jax.ops import backends, cpu
from xnor_jax.ops._mesh import over_images
from xnor_jax.ops.bits import WORD, unpack_negative, words_for
from xnor_jax.ops.cpu import operations
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
    """A convolution of floats with 1 to 3 spatial axes, channels last: `x ⊛ w + bias`.

    Differentiable in reverse mode only.

    Args:
      x: Images, `[N, *spatial, C]`.
      kernel: `[*window, C / groups, C_out]`, in the dtype of `x`.
      bias: `[C_out]`, in the dtype of `x`, or None.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      dilation: The kernel's dilation; one number, or one per spatial axis.
      groups: The number of channel groups.
      accumulator: The dtype of the sums and of the result; None for that of `x`.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA; the
        others have no gradients.

    Returns:
      `[N, *out, C_out]`.

    Raises:
      ValueError: If the geometry does not fit, or the backend does not support it.
      RuntimeError: If the backend is not available.
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
    x = cpu.vary_as(x, kernel)  # As in `binary_product`.
    kernel = cpu.vary_as(kernel, x)
    bias = None if bias is None else cpu.vary_as(bias, x)
    dtypes = [a for a in (x.dtype, kernel.dtype, accumulator) if a is not None]
    if not _compiles("conv", backend, x, groups, dtypes):
        return portable(x, kernel, bias)
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

    The sums are integers, hence exact. The gradient is that of `s ⊛ w̃ + bias` at
    `s = sign(x)` and `w̃ = α·sign(w)`; the surrogate maps the gradient at `s` to that
    at `x`, and the rule maps the gradient at `w̃` to that at `w`.

    Args:
      x: Activations `[N, *spatial, C]`; their signs are taken.
      kernel: `w`, `[*window, C / groups, C_out]`.
      bias: `[C_out]`, or None.
      keep: Dropout's mask, bool, of the shape of `x`; signs where it is False become 0.
      geometry: The windows over the image; `DENSE` for `[N, C]`.
      groups: The number of channel groups.
      keep_rate: The fraction of signs kept, in (0, 1]; kept signs are divided by it.
      relu: Whether a ReLU follows.
      rule: The kernel's gradient rule, a name or a function; see `xnor_jax.rules`.
      multiplier: A factor on the rule's gradient.
      surrogate: The sign's surrogate gradient, a name or a function; see
        `xnor_jax.quantizers`. None for `"identity"`.
      compute_dtype: The dtype of the products' operands, if narrower than float32 and
        the dtype of `x`. The sums are identical integers. Gradients are rounded to it
        before they are multiplied by signs; the gradient of the signs is rounded again.
      backend: `"auto"` or `"cpu"` for the compiled library, `"float"` for XLA; the
        others have no gradients.

    Returns:
      `[N, *out, C_out]`, in the dtype of `x`.

    Raises:
      ValueError: If the backend, rule or surrogate is unknown, or does not support the
        shapes, groups or dtypes.
      RuntimeError: If the backend is not available.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.1 and §3.2.
    """
    backend = backends.resolve(
        "binary_product", backend, len(geometry.window), gradient=True
    )
    channels = kernel.shape[-2] * groups
    if x.shape[-1] != channels:
        raise ValueError(
            f"binary_product: expected x of {channels} channels for a kernel "
            f"{kernel.shape} in {groups} groups, got shape {x.shape}"
        )
    narrower = jnp.finfo(compute_dtype).bits < min(32, jnp.finfo(x.dtype).bits)
    dtype = jnp.dtype(compute_dtype) if narrower else None
    function = quantizers.get("identity" if surrogate is None else surrogate)
    clipped = function is quantizers.ste
    x = x if clipped else quantizers.with_surrogate(function, x)
    # Outside the products, so that the rule's argument is the gradient summed over a
    # program's devices and uses of the kernel, not each summand.
    kernel = rules.with_rule(rule, kernel, multiplier)
    # Under `shard_map`, mark replicated arguments as varying, so that JAX and not the
    # gradients below sums their cotangents: `lax.platform_dependent` drops replication.
    x = cpu.vary_as(x, kernel)
    kernel = cpu.vary_as(kernel, x)
    bias = None if bias is None else cpu.vary_as(bias, x)
    args = (x, kernel, bias, keep)
    portable = partial(_in_floats, geometry, groups, keep_rate, relu, dtype, clipped)
    dtypes = [x.dtype, kernel.dtype]
    if not _compiles("binary_product", backend, x, groups, dtypes):
        return portable(*args)
    on_bits = partial(_on_bits, geometry, keep_rate, relu, dtype, clipped)
    return backends.choose(backend, on_bits, portable, *args)


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _on_bits(geometry, keep_rate, relu, dtype, clipped, x, kernel, bias, keep):
    settings = geometry, keep_rate, relu, dtype, clipped
    return _on_bits_fwd(*settings, x, kernel, bias, keep)[0]


def _on_bits_fwd(geometry, keep_rate, relu, dtype, clipped, x, kernel, bias, keep):
    packed, alpha = pack_kernel(kernel), scale(kernel)
    shift = jnp.zeros_like(alpha) if bias is None else bias

    def run(words, epilogue, dtype):
        operation = operations.conv(packed, epilogue, geometry)
        return cpu.run(words, [operation], geometry.out, packed.out_features, dtype)

    words, outside, others = _planes(geometry, clipped, x, keep)
    if others is None:
        y = run(words, Affine(alpha, shift, relu), jnp.float32)
    else:
        # A value in {−1, 0, +1} is the mean of two signs, which differ if it is 0.
        sums = run(words, Sums(), jnp.int32) + run(others, Sums(), jnp.int32)
        y = (alpha / (2 * keep_rate)) * sums.astype(alpha.dtype) + shift
        y = jax.nn.relu(y) if relu else y
    residuals = words, others, outside, kernel, alpha, bias, y if relu else None
    return y, residuals


def _planes(geometry, clipped, x, keep):
    """Words of the signs, of where the gradient is blocked and of the second signs.

    Those that are not needed are None. The flags are first computed as one byte per
    activation, not as words: XLA then fuses them with the computation of `x`, such as
    BatchNorm's result, which is never materialized.
    """
    negative = ~(x >= 0)  # NaN is negative, as in `sign`
    flags = [negative]
    if clipped:
        flags.append(~(jnp.abs(x) < 1))
    if keep is not None:
        flags.append(negative ^ ~keep)
    weights = [flag.astype(jnp.uint8) << at for at, flag in enumerate(flags)]
    bits = WORD * words_for(x.shape[-1])
    planes = cpu.run(
        reduce(jnp.bitwise_or, weights),
        [operations.pack_flags(len(flags))],
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
    # No gradient passes where `ste` clips or a sign was dropped.
    blocked = [] if outside is None else [outside]
    if others is None:
        others = words
    else:
        blocked.append(words ^ others)
    d_kernel = cpu.kernel_gradient(words, others, unscaled, kernel.shape, geometry)
    d_kernel = d_kernel / keep_rate
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
    operation = operations.real_conv(kernel, epilogue, geometry)
    return cpu.run(x, [operation], geometry.out, kernel.shape[-1], jnp.float32)


def _conv_fwd(geometry, x, kernel, bias):
    return _conv(geometry, x, kernel, bias), (x, kernel, bias)


def _conv_bwd(geometry, residuals, g):
    x, kernel, bias = residuals
    d_kernel = cpu.kernel_gradient(x, x, g, kernel.shape, geometry)
    return input_gradient(geometry, g, kernel), d_kernel, _bias_gradient(g, bias)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _bias_gradient(g, bias):
    # The sums of g · g are unused; this is still faster than XLA's sums of g alone.
    return None if bias is None else cpu.channel_sums(g, g, jnp.zeros_like(bias))[0]


def _compiles(where, backend, x, groups, dtypes):
    """Whether to use the compiled library; raises if requested but unsupported."""
    others = [jnp.dtype(dtype) for dtype in dtypes if dtype != jnp.float32]
    supported = groups == 1 and not others
    if backend == "cpu" and not supported:
        raise ValueError(
            f"{where}: the backend 'cpu' supports only one group and float32 arrays, "
            f"got feature_group_count={groups} and {(*others, 'float32')[0]}; use "
            "'auto' or 'float'"
        )
    # An empty batch needs no product, and the library does not take it.
    return backend in ("auto", "cpu") and supported and x.size > 0
