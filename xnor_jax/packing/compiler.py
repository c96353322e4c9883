"""`pack`: trace and lower a model or function, and compare the result with it."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike

from xnor_jax._tree import Mask, resolve_mask
from xnor_jax.masks import path_string
from xnor_jax.nn import BinaryConv, BinaryLinear
from xnor_jax.ops import backends
from xnor_jax.packing.exact import reference
from xnor_jax.packing.lower import lower
from xnor_jax.packing.network import PackedModel
from xnor_jax.packing.trace import PackError, trace
from xnor_jax.weights import binarize

Example = ArrayLike | jax.ShapeDtypeStruct
# Largest difference of a logit due to rounding, as a fraction of the largest logit.
_TOLERANCE = 1e-4
_IMAGES = 16


def pack(
    model: nnx.Module | Callable[[jax.Array], jax.Array],
    mask: Mask = None,
    *,
    example: Example | None = None,
    backend: str = "auto",
) -> PackedModel:
    """Pack a trained network: one bit per weight, integer sums, thresholds.

    The model's evaluation is traced into a graph for any batch size, whatever JAX
    library it is written in. It is traced with 2 and 3 images: Python code that treats
    larger batches in another way is not seen. Products of signs are found by value: an
    input known to lie in {−1, +1} and a constant kernel with one magnitude per output
    channel. α, bias, ReLU, max-pooling and BatchNorm between two of them fold into one
    integer threshold per channel, with exactly the signs that the float network
    computes. Real-valued layers stay real-valued; `PackedModel.report` names them.

    A product of signs is defined as `α · n` with the integer sum `n`, and every
    operation after it rounds its result, on the backend `cpu` and in the C API. A
    network that multiplies by `α · sign(w)`, or a program in which XLA fuses a product
    and a sum, agrees with this up to rounding. A straight-through
    `x + stop_gradient(sign(x) − x)` is taken as the sign, which it equals up to
    rounding for x of ordinary size.

    Before it returns, `pack` compares the packed network's outputs with those of the
    model, whose products of signs are evaluated by this definition.

    Args:
      model: An `nnx.Module` in evaluation mode, or any JAX function of one array
        `[N, ...]`: a Linen `apply` or an Equinox module with its parameters, a closure.
      mask: For a module, the binary kernels that are stored as latent weights, as in
        `binarize`: a bool tree of the structure of `nnx.state(model, nnx.Param)`, a
        prefix of one, or a callable. `BinaryConv`, `BinaryLinear` and `XnorBlock` need
        no mask.
      example: A batch of floating point inputs `[N, ...]`, each of 1 to 4 axes, or a
        `jax.ShapeDtypeStruct`. Required if the model has no attribute `image_shape`.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Returns:
      The packed network.

    Raises:
      ValueError: If the model cannot be packed as asked; the message names the layer or
        the operation and its line. No binary kernel is silently left in float: a ±α
        kernel whose input is not known to be ±1 raises.
      TypeError: If the model is abstract or traced, or is neither a module nor a
        function; if the example is not floating point.
      RuntimeError: If the backend is not available.

    References:
      Rastegari et al., XNOR-Net, 2016, §3.2.

    Examples:
      >>> import jax, xnor_jax as xnor
      >>> from flax import nnx
      >>> model = nnx.Sequential(
      ...     nnx.Linear(8, 64, rngs=nnx.Rngs(0)),
      ...     xnor.nn.XnorBlock(64, 32, rngs=nnx.Rngs(1)),
      ...     nnx.Linear(32, 10, rngs=nnx.Rngs(2)),
      ... )
      >>> model.eval()
      >>> packed = xnor.pack(model, example=jax.numpy.ones((1, 8)))
      >>> packed(jax.numpy.ones((5, 8))).shape
      (5, 10)
      >>> packed.report.rows[1].kind, packed.report.rows[1].bytes_after
      ('binary', 512)
    """
    # The packed network runs with this precision: see `network._run`.
    try:
        with jax.default_matmul_precision("highest"):
            packed, function, params = _packed(model, mask, example, backend)
            _check(packed, function, params, example)
    except jax.errors.TracerArrayConversionError as error:
        raise TypeError(
            "pack: expected concrete parameters, got traced ones; call pack outside "
            "jit, vmap and grad"
        ) from error
    return packed


def pack_unchecked(
    model: nnx.Module | Callable[[jax.Array], jax.Array],
    *,
    example: Example | None = None,
) -> PackedModel:
    """Pack without the final comparison, to report the costs of an untrained network.

    Args:
      model: As for `pack`.
      example: As for `pack`.
    """
    return _packed(model, None, example, "auto")[0]


def _packed(model: Any, mask: Mask, example: Example | None, backend: str):
    """The packed network, and the function and parameters that it was built from."""
    backends.resolve("pack", backend)
    if isinstance(model, PackedModel):
        raise TypeError("pack: expected a network, got one that is packed already")
    if not isinstance(model, nnx.Module) and not callable(model):
        raise TypeError(
            f"pack: expected an nnx.Module or a function, got {type(model).__name__}"
        )
    shape = _image_shape(model, example)
    if isinstance(model, nnx.Module):
        function, params, counted, masked = _of_module(model, mask)
    elif mask is not None:
        raise ValueError(
            "pack: a mask is for an nnx.Module; in a function, apply "
            "xnor_jax.binarize(params, mask) to the parameters"
        )
    else:
        function, params, counted, masked = (lambda _, x: model(x)), (), None, ()
    traced = trace(function, params, shape)
    if counted is not None:
        parameters = {k: v for k, v in traced.parameters.items() if k in counted}
        traced = dataclasses.replace(traced, parameters=parameters)
    nodes = lower(traced, masked)
    packed = PackedModel(nodes=nodes, image_shape=shape, backend=backend)
    return packed, function, params


def _of_module(model: nnx.Module, mask: Mask):
    """A module as a function, its state, its parameters' paths and the masked ones."""
    _check_concrete(model)
    # A copy, whose xnor_jax layers trace to JAX operations whatever their backend was.
    copy = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(copy):
        if type(module).__module__.startswith("xnor_jax.") and hasattr(
            module, "backend"
        ):
            cast(Any, module).backend = "float"
    graphdef, state = nnx.split(copy)
    state = jax.tree.map(_concrete, state)
    params = nnx.state(copy, nnx.Param)
    counted = {path_string(path) for path, _ in jax.tree.leaves_with_path(params)}
    if mask is None:
        return (lambda s, x: nnx.merge(graphdef, s)(x)), state, counted, ()
    full = resolve_mask("pack", mask, params)
    chosen = [path_string(path) for path, on in jax.tree.leaves_with_path(full) if on]
    for path, leaf in jax.tree.leaves_with_path(params):
        if path_string(path) in chosen and np.ndim(leaf) < 2:
            raise PackError(
                f"pack: the mask selects {path_string(path)}, which is not a kernel"
            )
    # Binary layers binarize their kernels themselves.
    own = {
        "/".join(map(str, (*path, "kernel")))
        for path, module in nnx.iter_modules(copy)
        if isinstance(module, BinaryConv | BinaryLinear) and module.binary
    }
    latent = jax.tree.map_with_path(
        lambda path, on: on and path_string(path) not in own, full
    )

    def function(state, x):
        module = nnx.merge(graphdef, state)
        now = nnx.state(module, nnx.Param)
        nnx.update(module, binarize(now, latent, rule="ste"))
        return module(x)

    return function, state, counted, chosen


def _concrete(leaf: Any) -> Any:
    """A leaf; an abstract one, such as unused random state, becomes a key or zeros."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return np.zeros(leaf.shape, leaf.dtype)


def _check_concrete(model: nnx.Module) -> None:
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    for path, leaf in jax.tree.leaves_with_path(state):
        if isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array | np.ndarray):
            raise TypeError(
                "pack: expected a model with concrete arrays, got "
                f"{type(leaf).__name__} at {path_string(path)}; call pack outside "
                "jit, on a model that is not abstract"
            )


def _image_shape(model: Any, example: Example | None) -> tuple[int, ...]:
    dtype = getattr(example, "dtype", np.dtype(float))
    if example is not None and not hasattr(example, "shape"):  # numbers in lists
        try:
            dtype = np.asarray(example).dtype
        except ValueError:  # rows of different lengths
            dtype = np.dtype(object)
        if not np.issubdtype(dtype, np.number):
            raise TypeError(
                "pack: expected an example array [N, ...], got "
                f"{type(example).__name__}"
            )
        dtype = np.dtype(float)  # integers in lists are numbers, too
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"pack: expected an example of floating point numbers, got {dtype}; "
            "prepare it as in training"
        )
    given = None if example is None else tuple(np.shape(example))
    if given is not None and len(given) < 2:
        raise ValueError(f"pack: expected an example [N, ...], got shape {given}")
    shape = getattr(model, "image_shape", None)
    if shape is None:
        shape = given and given[1:]
    if shape is None:
        raise ValueError(
            "pack: expected an example (a batch of inputs), since "
            f"{type(model).__name__} has no attribute image_shape"
        )
    shape = tuple(map(int, shape))
    if not 1 <= len(shape) <= 4:
        raise ValueError(f"pack: expected inputs of 1 to 4 axes, got shape {shape}")
    if given is not None and given[1:] != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"pack: expected an example of [N, {sizes}], got {given}")
    return shape


def _check(
    packed: PackedModel, function: Callable, params: Any, example: Example | None
) -> None:
    """Compare the packed network with the reference evaluation of the function.

    A real-valued layer may round its sums differently and so flip a sign: in one image
    of some thousands, or, where millions of floats meet a sign, in one of ten. Hence a
    difference on the example is not final: random images decide. One of them may
    differ, and so may those on which the function itself differs after a rounding of
    its input; but not more than half.

    Raises:
      PackError: If more of the random images differ.
    """
    noise = np.random.default_rng(0).normal(size=(_IMAGES, *packed.image_shape))
    x = noise.astype(np.float32)
    if example is not None and not isinstance(example, jax.ShapeDtypeStruct):
        given = np.asarray(example, np.float32)
        finite = given[np.isfinite(given)]
        if finite.size:
            x = (x * finite.std() + finite.mean()).astype(np.float32)
        if 0 < given.size == finite.size:
            wanted = reference(function, params, jnp.asarray(given))
            if not _differs(packed(given), wanted).any():
                return
    wanted = reference(function, params, jnp.asarray(x))
    differs = _differs(packed(x), wanted)
    if (wrong := differs).sum() > 1:
        # By one or two units in the last place of float32.
        directions = np.sign(np.random.default_rng(1).normal(size=x.shape))
        rounded = (x * (1 + 2.0**-23 * directions)).astype(np.float32)
        rounded = reference(function, params, jnp.asarray(rounded))
        wrong = differs & ~_differs(rounded, wanted)
    if wrong.sum() > 1 or differs.mean() > 0.5:
        raise PackError(
            "pack: the packed network disagrees with the model on "
            f"{differs.mean():.0%} of random images. If windows of binary products are "
            "summed before a sign, use xnor_jax.nn.AvgPool, because XLA's order of "
            "additions varies; if not, this is a bug in xnor_jax, please report it"
        )


def _differs(found: jax.Array | np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each image, whether its logits differ by more than rounding."""
    found, wanted = (
        np.asarray(a, np.float64).reshape(len(a), -1) for a in (found, wanted)
    )
    finite = np.isfinite(wanted)
    same = np.where(finite, 0, ~((found == wanted) | np.isnan(wanted)))
    off = np.where(finite, np.abs(found - np.where(finite, wanted, 0)), same)
    largest = np.abs(np.where(finite, wanted, 0)).max(initial=0)
    # `~(off <= …)`, not `off > …`: a NaN in one of the two alone counts as different.
    return ~(off <= _TOLERANCE * max(largest, 1e-30)).all(-1)
