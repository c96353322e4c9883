"""Networks with a `__call__` of their own: only their products are packed.

Each binary layer in a copy of the module gives way to one that holds bits and computes
`α · sums + bias`. Whether its input really is ±1 no one can read off the module, so an
example is run through it, and every product is compared with the float one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from xnor_jax import masks, ops
from xnor_jax._tree import Mask
from xnor_jax.convolution import conv, dot
from xnor_jax.deploy import reading, stages
from xnor_jax.deploy.reading import Product
from xnor_jax.deploy.report import Report, Row
from xnor_jax.deploy.stage import Spec, Stage, static
from xnor_jax.geometry import Padding, conv_geometry
from xnor_jax.ops import Affine, PackedKernel, Sums
from xnor_jax.weights import sign


class Packed(nnx.Variable):
    """What a packed layer holds; no `nnx.Param`: it has no gradient."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plain(Stage):
    """A whole network, its products packed.

    Attributes:
      state: The arrays of the module.
      graphdef: The rest of it; static.
    """

    kind = "plain"
    state: Any
    graphdef: Any = static()

    def out(self, spec: Spec) -> Spec:
        """Not known: the network has its own `__call__`."""
        raise ValueError("a network with its own __call__ does not tell its output")

    def __call__(self, x: jax.Array, backend: str) -> Any:
        """Call the network."""
        model = nnx.merge(self.graphdef, self.state)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, PackedLayer):
                module.backend = backend
        return model(x)


class PackedLayer(nnx.Module):
    """A convolution or dense layer on bits, in the place of a float one.

    Args:
      product: What it computes.
    """

    def __init__(self, product: Product):
        assert product.scale is not None
        kernel = ops.pack_kernel(product.kernel, product.groups)
        self.words = Packed(kernel.words)
        self.in_features = kernel.in_features
        self.out_features = kernel.out_features
        self.scale = Packed(product.scale)
        bias = product.bias
        self.bias = Packed(jnp.zeros_like(product.scale) if bias is None else bias)
        # The numbers are in the variables: here only how the layer goes over an image.
        self.name = product.name
        self.window = product.window
        self.strides = product.strides
        self.padding: Padding = product.padding
        self.dilation = product.dilation
        self.groups = product.groups
        self.input_scale = product.input_scale
        self.backend = "auto"

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map `[..., *spatial, C]` to `[..., *out, C_out]`."""
        x = jnp.asarray(x)
        flat = self.batched(x)
        scale, bias = self.scale[...], self.bias[...]
        if self.input_scale:
            layer = stages.ScaledConv(scale=scale, bias=bias, **self._settings(flat))
            y = layer(flat, self.backend)
        else:
            y = self.product(flat, Affine(scale, bias))
        return y.reshape(*x.shape[: x.ndim - flat.ndim + 1], *y.shape[1:])

    def batched(self, x: jax.Array) -> jax.Array:
        """Images with a single batch axis, `[N, *spatial, C]`."""
        return x.reshape(-1, *x.shape[x.ndim - 1 - len(self.window) :])

    def product(self, x: jax.Array, epilogue: Affine | Sums) -> Any:
        """What becomes of the sums of signs, on images `[N, *spatial, C]`."""
        scale = self.scale[...]
        layer = stages.PackedConv(epilogue=Affine(scale, scale), **self._settings(x))
        bits = ops.sign_bits(x, backend=self.backend)
        return layer.product(bits, epilogue, self.backend)

    def geometry(self, x: jax.Array) -> dict[str, Any]:
        """Strides, padding in numbers and dilation on images `[N, *spatial, C]`."""
        names = ("strides", "padding", "dilation")
        given = {name: getattr(self, name) for name in names}
        return conv_geometry(self.name, x.shape[1:-1], self.window, **given).options

    def _settings(self, x: jax.Array) -> dict[str, Any]:
        words = self.words[...]
        kernel = PackedKernel(words, self.in_features, self.out_features)
        settings = {"name": self.name, "kernel": kernel}
        if self.window:
            settings |= {**self.geometry(x), "groups": self.groups}
        return settings


def pack(
    model: nnx.Module, mask: Mask, example: ArrayLike | None, backend: str
) -> tuple[Plain, Report, tuple[int, ...]]:
    """Pack the products of a network with its own `__call__`, and try them.

    Args:
      model: Any module; left as it is.
      mask: Kernels of `nnx.Conv` and `nnx.Linear` that are binary, or None.
      example: A batch of inputs.
      backend: For trying.

    Returns:
      The network as one stage, its report, and the shape of an input.

    Raises:
      ValueError: If there is no example or no binary layer, the mask selects what
        cannot be packed, or the example shows that a layer gets no signs.
    """
    if example is None:
        raise ValueError(
            f"pack: expected an example, a batch of inputs: {type(model).__name__} has "
            "its own __call__, and only a run shows what its layers get"
        )
    x = jnp.asarray(example)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1 or x.shape[0] < 1:
        raise ValueError(f"pack: expected a batch of floats as example, got {x.dtype}")
    masked = reading.masked_kernels(model, mask)
    names = _names(model)
    products: dict[str, Product] = {}

    def packed_layer(node: Any, name: str) -> Product | None:
        found = reading.product(node, name, masked)
        return found if found is not None and found.scale is not None else None

    def replace(path: Any, node: Any) -> Any:
        name = names.get(id(getattr(node, "kernel", None)), "/".join(map(str, path)))
        found = packed_layer(node, name) if isinstance(node, nnx.Module) else None
        if found is None:
            return node
        products[name] = found
        return PackedLayer(found)

    made = nnx.recursive_map(replace, model)
    _check_masked(masked, products)
    if not products:
        raise ValueError(
            "pack: expected a model with a binary layer, got none; give a mask of the "
            "kernels that are binary"
        )
    made.eval()
    run = _Run(products, images=x.shape[0])

    def probe(path: Any, node: Any) -> Any:
        name = names.get(id(getattr(node, "kernel", None)), "/".join(map(str, path)))
        found = packed_layer(node, name) if isinstance(node, nnx.Module) else None
        if found is not None:
            return _Probe(node, found, run, backend)
        return run.listen(node, name)

    tried = nnx.recursive_map(probe, nnx.recursive_map(lambda _, node: node, model))
    tried.eval()
    probes, numbers = nnx.split(tried)
    jax.jit(lambda s, x: nnx.merge(probes, s)(x))(numbers, x.astype(jnp.float32))
    run.check()
    graphdef, state = nnx.split(made)
    stage = Plain(name=type(model).__name__, state=state, graphdef=graphdef)
    return stage, _report(model, products, run), tuple(x.shape[1:])


def _names(model: nnx.Module) -> dict[int, str]:
    """The layers' paths, in the order of definition, by the `id` of their kernel."""
    found = {}
    for paths in masks.definition_order(model):
        node: Any = model
        for key in paths[0]:
            by_name = isinstance(key, str) and hasattr(node, key)
            node = getattr(node, key) if by_name else node[key]
        found[id(node)] = "/".join(map(str, paths[0][:-1]))
    return found


def _check_masked(masked: dict[int, str], products: dict[str, Product]) -> None:
    for at in masked.values():
        if at.rpartition("/")[0] not in products:
            raise ValueError(
                f"pack: the mask selects {at}, which is no kernel of an nnx.Conv, "
                "nnx.Linear or a layer of xnor_jax.nn"
            )


class _Run:
    """What trying the example shows."""

    def __init__(self, products: dict[str, Product], images: int):
        self.products = products
        self.images = images
        self.found: dict[str, np.ndarray] = {}
        self.macs: dict[str, int] = {}

    def note(self, name: str, flags: np.ndarray) -> None:
        """Whether a layer's input was ±1, its integers and its floats were right."""
        self.found[name] = self.found.get(name, True) & np.asarray(flags)

    def count(self, name: str, y: jax.Array, kernel: Any) -> None:
        """Add the multiplications of a product to its layer's."""
        macs = y.size // kernel.shape[-1] * kernel.size // self.images
        self.macs[name] = self.macs.get(name, 0) + macs

    def listen(self, node: Any, name: str) -> Any:
        """Let a float layer tell the products that it makes."""
        for function in ("conv_general_dilated", "dot_general"):
            if isinstance(node, nnx.Conv | nnx.Linear) and hasattr(node, function):
                setattr(node, function, self._counting(getattr(node, function), name))
        return node

    def _counting(self, function: Callable[..., jax.Array], name: str):
        def counted(x, kernel, *args, **kwargs):
            y = function(x, kernel, *args, **kwargs)
            self.count(name, y, kernel)
            return y

        return counted

    def check(self) -> None:
        """Refuse what the example has shown to be wrong.

        Raises:
          ValueError: Naming the layer.
        """
        jax.effects_barrier()
        for name in self.products:
            if name not in self.found:
                raise ValueError(f"pack: {name}: the example never runs through it")
            signs, integers, floats = self.found[name]
            if not signs:
                raise ValueError(
                    f"pack: {name}: its kernel is binary, but its input is not ±1 "
                    "everywhere; put xnor_jax.sign_ste before it"
                )
            if not integers or not floats:
                raise ValueError(
                    f"pack: {name}: the packed layer does not give the float layer's "
                    "numbers on the example"
                )


class _Probe(nnx.Module):
    """A packed layer that is compared with the float one wherever it runs."""

    def __init__(self, layer: Any, product: Product, run: _Run, backend: str):
        self.packed = PackedLayer(product)
        self.packed.backend = backend
        self.layer = nnx.clone(layer)
        if not product.signs:
            assert product.scale is not None
            self.layer.kernel = nnx.Param(product.scale * product.kernel)
        self.signs = product.signs
        self.run = run

    def __call__(self, x: jax.Array) -> jax.Array:
        packed, run = self.packed, self.run
        flat = packed.batched(x)
        sums = packed.product(flat, Sums())
        run.count(packed.name, sums, self.layer.kernel)
        y, wanted = packed(x), self.layer(x)
        flags = [
            self.signs | jnp.all(jnp.abs(x) == 1),
            jnp.all(sums == self._sums(flat)),
            jnp.allclose(y, wanted, rtol=1e-4, atol=1e-4 * jnp.abs(wanted).max()),
        ]
        jax.debug.callback(partial(run.note, packed.name), jnp.stack(flags))
        return y

    def _sums(self, x: jax.Array) -> jax.Array:
        kernel = self.run.products[self.packed.name].kernel
        if not self.packed.window:
            sums = dot(sign(x), kernel)
        else:
            options = {**self.packed.geometry(x), "groups": self.packed.groups}
            sums = conv(sign(x), kernel, **options)
        return jnp.rint(sums).astype(jnp.int32)


def _report(model: nnx.Module, products: dict[str, Product], run: _Run) -> Report:
    modules = {
        id(getattr(module, "kernel", None)): module
        for _, module in nnx.iter_modules(model)
    }
    rows: list[Row] = []
    for key, name in _names(model).items():
        module: Any = modules[key]
        weights, binary = module.kernel.size, name in products
        bias = getattr(module, "bias", None)
        others = 0 if bias is None else bias.size
        macs = run.macs.get(name, 0)
        after = -(-weights // 8) + 8 * module.kernel.shape[-1]
        rows.append(
            Row(
                name=name,
                kind="binary" if binary else "real",
                bits=1 if binary else 32,
                weights=weights,
                bytes_before=4 * (weights + others),
                bytes_after=after if binary else 4 * (weights + others),
                binary_macs=macs if binary else 0,
                real_macs=0 if binary else macs,
                output="float",
            )
        )
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    rest = 4 * sum(leaf.size for leaf in leaves) - sum(row.bytes_before for row in rows)
    if rest:
        rows.append(
            Row("other parameters", "real", 32, rest // 4, rest, rest, 0, 0, "float")
        )
    return Report(tuple(rows))
