"""Binary layers: products of the signs of inputs and kernels."""

from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.experimental import checkify
from jax.typing import ArrayLike

from xnor_jax import convolution, quantizers, rules, weights
from xnor_jax._kernel import check_real
from xnor_jax.geometry import (
    DENSE,
    Geometry,
    Padding,
    check_features,
    check_padding,
    conv_geometry,
    kernel_window,
    per_axis,
)
from xnor_jax.ops import backends, training
from xnor_jax.ops.bits import random_bits
from xnor_jax.quantizers import Surrogate
from xnor_jax.registry import Precision
from xnor_jax.rules import Rule
from xnor_jax.weights import WeightMethod


class _Binary(nnx.Module):
    """The base class of the binary convolution and the binary dense layer."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        use_bias: bool,
        dropout: float,
        input_scale: bool,
        rule: str | Rule,
        multiplier: float,
        surrogate: str | Surrogate | None,
        weight_method: str | WeightMethod,
        precision: Precision,
        binary: bool,
        backend: str,
        dtype: Dtype | None,
        compute_dtype: Dtype,
        param_dtype: Dtype,
        kernel_init: Initializer,
        bias_init: Initializer,
        rngs: nnx.Rngs,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        compute_dtype = jnp.dtype(compute_dtype)
        if compute_dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"compute_dtype: expected float32 or bfloat16, got {compute_dtype}"
            )
        if precision not in get_args(Precision):
            names = ", ".join(get_args(Precision))
            raise ValueError(f"precision: expected one of {names}, got {precision!r}")
        weights.get(weight_method)
        if binary and precision == "32w1a" and weight_method != "latent":
            raise ValueError(
                "weight_method: expected 'latent' with precision 32w1a, whose kernel "
                f"is not binarized, got {weight_method!r}"
            )
        if input_scale and binary and precision == "1w32a":
            raise ValueError(
                "input_scale: expected False with precision 1w32a, whose input has no "
                "sign to scale"
            )
        signs = binary and precision == "1w1a"
        if compute_dtype != jnp.float32 and not signs:
            reason = f"precision {precision}" if binary else "binary=False"
            raise ValueError(
                f"compute_dtype: expected float32 with {reason}, which does not "
                f"multiply signs, got {compute_dtype}"
            )
        centring = rules.get(rule) in (rules.corrected, rules.paper)
        if binary and precision != "32w1a" and shape[-2] == 1 and centring:
            name = rule if isinstance(rule, str) else rule.__name__
            groups = getattr(self, "feature_group_count", 1)
            where = f" (feature_group_count={groups})" if groups > 1 else ""
            raise ValueError(
                f"{type(self).__name__}: expected at least 2 input channels per "
                f"filter, got 1{where}: centring would zero the kernel, and the rule "
                f'{name!r} its gradient; use rule="exact"'
            )
        if surrogate is not None:
            quantizers.get(surrogate)
        backends.resolve(type(self).__name__, backend, len(shape) - 2, gradient=True)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), shape[-1:], param_dtype))
            if use_bias
            else None
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        self.input_scale = input_scale
        self.rule = rule
        self.multiplier = multiplier
        self.surrogate = surrogate
        self.weight_method = weight_method
        self.precision = precision
        self.binary = binary
        self.backend = backend
        self.dtype = dtype
        self.compute_dtype = compute_dtype

    @property
    def kernel_rank(self) -> int:
        """The rank of one kernel, for `masks.inner_kernels`."""
        return 2

    @property
    def signs_input(self) -> bool:
        """Whether the layer multiplies signs of its input."""
        return self.binary and self.precision != "1w32a"

    def _apply(
        self, x: jax.Array, geometry: Geometry, *, groups: int = 1, relu: bool
    ) -> jax.Array:
        kernel, name = self.kernel[...], type(self).__name__
        if kernel.ndim != self.kernel_rank:
            raise ValueError(
                f"{name}: expected a kernel [{len(geometry.window)} spatial axes, "
                f"C_in, C_out], got shape {kernel.shape}; call layers that were "
                "stacked by nnx.vmap under nnx.scan or nnx.vmap"
            )
        check_real(name, x)
        signed_input = self.signs_input
        signed_kernel = self.binary and self.precision != "32w1a"
        if signed_input and self.surrogate is None:
            _check_signs(name, x)
        dtype = jnp.dtype(self.dtype or jnp.result_type(x, kernel))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating point dtype, got {dtype}")
        x = x.astype(dtype)
        bias = None if self.bias is None else self.bias[...].astype(dtype)
        scaled = signed_input and self.input_scale
        if signed_kernel:
            kernel = weights.apply_method(self.weight_method, kernel)
        if not (signed_input and signed_kernel):
            operand = x
            if signed_input and self.surrogate is not None:
                operand = quantizers.sign(x, self.surrogate)
            if signed_kernel:
                kernel = weights.binarize(
                    kernel, rule=self.rule, multiplier=self.multiplier
                )
            operand = self.dropout(operand) if self.dropout else operand
            y = self._real_product(operand, kernel.astype(dtype), geometry, groups)
        else:
            settings: dict[str, Any] = {
                "geometry": geometry,
                "groups": groups,
                "rule": self.rule,
                "multiplier": self.multiplier,
                "surrogate": self.surrogate,
                "compute_dtype": self.compute_dtype,
                "backend": self.backend,
                **self._dropout_options(x),
            }
            if not scaled:
                settings |= {"bias": bias, "relu": relu}
                return training.binary_product(x, kernel, **settings)
            y = training.binary_product(x, kernel, **settings)
        if scaled:
            mean = jnp.mean(jnp.abs(x), axis=-1, keepdims=True)
            dense = geometry == DENSE
            y = y * (mean if dense else convolution.mean_pool(mean, geometry))
        y = y if bias is None else y + bias
        return nnx.relu(y) if relu else y

    def _real_product(
        self, x: jax.Array, kernel: jax.Array, geometry: Geometry, groups: int
    ) -> jax.Array:
        if geometry == DENSE:
            backends.resolve(type(self).__name__, self.backend, gradient=True)
            return convolution.dot(x, kernel)
        return training.conv(
            x, kernel, **geometry.options, groups=groups, backend=self.backend
        )

    def _dropout_options(self, x: jax.Array) -> dict[str, Any]:
        """Dropout's arguments of `training.binary_product`; none in evaluation."""
        if self.dropout is None or self.dropout.deterministic:
            return {}
        stream = self.dropout.rngs
        if self.dropout.rate == 0.5 and isinstance(stream, nnx.RngStream):
            keep = random_bits(stream(), x.shape)
        else:
            keep = self.dropout(jnp.ones_like(x)) > 0
        return {"keep": keep, "keep_rate": 1 - self.dropout.rate}


def _check_signs(name: str, x: jax.Array) -> None:
    """Check that activations are ±1, if their values are available.

    Raises:
      ValueError: If concrete activations are not ±1. Under `checkify` the check is part
        of the program; under `jit` alone there is none.
    """
    message = (
        f"{name}: surrogate=None expects activations of −1 and +1, got other values; "
        "put a sign before the layer, or give it a surrogate (for dropout, use the "
        "layer's argument)"
    )
    signs = jnp.all(jnp.abs(x) == 1)
    try:
        known = bool(signs)
    except jax.errors.ConcretizationTypeError:
        checkify.debug_check(signs, message)
        return
    if not known:
        raise ValueError(message)


class BinaryConv(_Binary):
    """A convolution of signs of rank 1 to 3: `K · α · (sign(x) ⊛ sign(w)) + bias`.

    The padding is zeros in ±1 space: a tap outside the image adds 0 to the sum.

    The layer takes the sign of its input itself. A separate sign before it blocks the
    gradient: at ±1 the layer's `ste`, strict in `|x| < 1`, is exactly zero. After a
    separate sign, such as `RSign`, use `surrogate=None`: the layer then uses its ±1
    input as it is and passes the gradient unchanged.

    `K` is 1, or with `input_scale` the paper's `A ∗ k`, where `A = mean |x|` over the
    channels and `k` is a box filter `1/(kh·kw)` with the convolution's geometry.

    Args:
      in_features: Input channels, `C`.
      out_features: Output channels, `C_out`.
      kernel_size: The window, one number per spatial axis; one number for rank 1.
      strides: One number, or one per spatial axis.
      padding: `"SAME"`, `"VALID"`, a number, or per axis a number or (before, after).
      kernel_dilation: One number, or one per spatial axis.
      feature_group_count: Number of groups; the kernel is `[*window, C/groups, C_out]`.
      use_bias: Whether to add a real bias.
      dropout: The probability in [0, 1) of dropping a sign in training.
      input_scale: Whether to multiply by `K`.
      rule: The kernel's gradient rule, a name or a function: see `xnor_jax.rules`.
      multiplier: A factor on the rule's gradient.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`;
        None for an input that is already ±1.
      weight_method: The function of the kernel whose result is binarized: `"latent"`,
        the identity; `"libra"` or `"recu"`, of `xnor_jax.weights`; or a custom one.
      precision: Bits of weights and activations: `"1w1a"`; `"1w32a"`, the paper's
        Binary-Weight-Network, with a real input; or `"32w1a"`, with a real kernel, the
        first stage of two-stage training.
      binary: False for the float twin, whatever the precision.
      backend: `"auto"`, the compiled library on a CPU and XLA's float products
        elsewhere; `"float"`, XLA's; or `"cpu"`, the library, which raises for several
        groups, three spatial axes and dtypes other than float32. Other backends have no
        gradients and raise. The sums of signs do not depend on the backend.
      dtype: The dtype of input and output; None infers it from the input and kernel.
      compute_dtype: The dtype of the operands in products of signs: float32 or
        bfloat16. The sums are the same integers in both. Gradients are rounded to it
        before they are multiplied by signs; those of the input's signs also afterwards.
      param_dtype: The dtype of the latent kernel and the bias.
      kernel_init: Initializer of the latent kernel.
      bias_init: Initializer of the bias.
      rngs: RNG streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: If an argument is unknown or out of range; the groups do not divide
        the channels; the window does not fit; a group has one input channel under the
        rules `corrected` or `paper`; `compute_dtype` is not float32 and the layer
        does not multiply signs; `input_scale` is used with `1w32a`; or, with
        `surrogate=None`, a concrete input is not ±1.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2.
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
        dropout: float = 0.0,
        input_scale: bool = False,
        rule: str | Rule = "corrected",
        multiplier: float = 1.0,
        surrogate: str | Surrogate | None = "ste",
        weight_method: str | WeightMethod = "latent",
        precision: Precision = "1w1a",
        binary: bool = True,
        backend: str = "auto",
        dtype: Dtype | None = None,
        compute_dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        window = kernel_window("BinaryConv", kernel_size)
        rank = len(window)
        check_features(
            "BinaryConv", in_features, out_features, groups=feature_group_count
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = window
        self.strides = per_axis("BinaryConv", "strides", strides, rank)
        self.padding: Padding = check_padding("BinaryConv", padding)
        self.kernel_dilation = per_axis(
            "BinaryConv", "kernel_dilation", kernel_dilation, rank
        )
        self.feature_group_count = feature_group_count
        super().__init__(
            (*window, in_features // feature_group_count, out_features),
            use_bias=use_bias,
            dropout=dropout,
            input_scale=input_scale,
            rule=rule,
            multiplier=multiplier,
            surrogate=surrogate,
            weight_method=weight_method,
            precision=precision,
            binary=binary,
            backend=backend,
            dtype=dtype,
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    @property
    def kernel_rank(self) -> int:
        """The rank of one kernel: the window's axes and two axes of channels."""
        return len(self.kernel_size) + 2

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map images `[N, *spatial, C]` to `[N, *out, C_out]`."""
        return self.then(x, relu=False)

    def then(self, x: ArrayLike, *, relu: bool) -> jax.Array:
        """Apply the layer and, if `relu`, a ReLU, fused with it where possible."""
        x = jnp.asarray(x)
        rank = len(self.kernel_size)
        if x.ndim != rank + 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"BinaryConv: expected [N, {rank} spatial axes, {self.in_features}], "
                f"got shape {x.shape}"
            )
        geometry = conv_geometry(
            "BinaryConv",
            x.shape[1:-1],
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
        )
        return self._apply(x, geometry, groups=self.feature_group_count, relu=relu)


class BinaryLinear(_Binary):
    """A dense layer of signs: `K · α · (sign(x) · sign(w)) + bias`.

    The layer takes the sign of its input itself; after a separate sign, use
    `surrogate=None`: see `BinaryConv`.

    `K` is 1, or with `input_scale` the paper's `mean |x|` over the features.

    Args:
      in_features: Input features, `C_in`.
      out_features: Output features, `C_out`.
      use_bias: Whether to add a real bias.
      dropout: The probability in [0, 1) of dropping a sign in training.
      input_scale: Whether to multiply by `K`.
      rule: The kernel's gradient rule, a name or a function: see `xnor_jax.rules`.
      multiplier: A factor on the rule's gradient.
      surrogate: The sign's gradient, a name or a function: see `xnor_jax.quantizers`;
        None for an input that is already ±1.
      weight_method: The function of the kernel whose result is binarized: `"latent"`,
        the identity; `"libra"` or `"recu"`, of `xnor_jax.weights`; or a custom one.
      precision: Bits of weights and activations: `"1w1a"`; `"1w32a"`, the paper's
        Binary-Weight-Network, with a real input; or `"32w1a"`, with a real kernel, the
        first stage of two-stage training.
      binary: False for the float twin, whatever the precision.
      backend: `"auto"`, the compiled library on a CPU and XLA's float products
        elsewhere; `"float"`, XLA's; or `"cpu"`, the library, which raises for several
        groups, three spatial axes and dtypes other than float32. Other backends have no
        gradients and raise. The sums of signs do not depend on the backend.
      dtype: The dtype of input and output; None infers it from the input and kernel.
      compute_dtype: The dtype of the operands in products of signs: float32 or
        bfloat16. The sums are the same integers in both. Gradients are rounded to it
        before they are multiplied by signs; those of the input's signs also afterwards.
      param_dtype: The dtype of the latent kernel and the bias.
      kernel_init: Initializer of the latent kernel.
      bias_init: Initializer of the bias.
      rngs: RNG streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: If an argument is unknown or out of range; there is one input feature
        under the rules `corrected` or `paper`; `compute_dtype` is not float32 and
        the layer does not multiply signs; `input_scale` is used with `1w32a`; or, with
        `surrogate=None`, a concrete input is not ±1.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dropout: float = 0.0,
        input_scale: bool = False,
        rule: str | Rule = "corrected",
        multiplier: float = 1.0,
        surrogate: str | Surrogate | None = "ste",
        weight_method: str | WeightMethod = "latent",
        precision: Precision = "1w1a",
        binary: bool = True,
        backend: str = "auto",
        dtype: Dtype | None = None,
        compute_dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        bias_init: Initializer = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
    ):
        check_features("BinaryLinear", in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        super().__init__(
            (in_features, out_features),
            use_bias=use_bias,
            dropout=dropout,
            input_scale=input_scale,
            rule=rule,
            multiplier=multiplier,
            surrogate=surrogate,
            weight_method=weight_method,
            precision=precision,
            binary=binary,
            backend=backend,
            dtype=dtype,
            compute_dtype=compute_dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[..., C_in]` to `[..., C_out]`."""
        return self.then(x, relu=False)

    def then(self, x: ArrayLike, *, relu: bool) -> jax.Array:
        """Apply the layer and, if `relu`, a ReLU, fused with it where possible."""
        x = jnp.asarray(x)
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"BinaryLinear: expected [..., {self.in_features}], got shape {x.shape}"
            )
        rows = x.reshape(-1, self.in_features)
        y = self._apply(rows, DENSE, relu=relu)
        return y.reshape(*x.shape[:-1], y.shape[-1])
