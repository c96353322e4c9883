"""A trained network at one bit a weight, as a pytree that runs on bits."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from xnor_jax._kernel import describe
from xnor_jax._tree import Mask
from xnor_jax.deploy import plain, reading
from xnor_jax.deploy.building import build
from xnor_jax.deploy.encoding import stored_bytes
from xnor_jax.deploy.report import Report, report
from xnor_jax.deploy.running import run_chained, run_stages
from xnor_jax.deploy.stage import Spec, Stage, static
from xnor_jax.ops import backends


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become what the network was trained on: `(x / 255 − mean) / std`.

    Attributes:
      mean: Of the pixels as fractions of 255, one per channel.
      std: Their standard deviation, one per channel, above 0.
      resize: What the shorter side of a picture becomes before the centre is cut, as
        large as the network's images; None stretches it to their size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None

    def __call__(self, images: ArrayLike) -> jax.Array:
        """Map uint8 `[..., C]` to float32 of the same shape."""
        pixels = jnp.asarray(images)
        if pixels.dtype != jnp.uint8:
            raise TypeError(
                f"Preprocessing: expected uint8 pixels, got {describe(pixels)}"
            )
        mean, std = (jnp.asarray(a, jnp.float32) for a in (self.mean, self.std))
        return (pixels.astype(jnp.float32) / 255 - mean) / std


@dataclass(frozen=True)
class Info:
    """What a file says of its network beside what it computes.

    Attributes:
      name: Such as the recipe's.
      preprocessing: Of the images, if it is known.
      class_names: One per logit; empty if they are not known.
      test_accuracy: A fraction of 1, when the network was packed.
      dataset: What it was trained on, by its name in `xnor_jax.data`.
    """

    name: str | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    test_accuracy: float | None = None
    dataset: str | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class PackedModel:
    """A network of packed kernels, thresholds and what stays real: a pytree.

    Call it on float images to get logits. `jax.jit`, `jax.vmap`, `jax.shard_map` and
    inputs sharded over a mesh's Auto axes work: each device computes its own images. It
    has no gradient. Images of another shape than `image_shape` are refused.

    Attributes:
      stages: What runs, in this order.
      image_shape: The input's shape without the batch; static.
      report: One row a layer; static.
      info: What is known of the network; static.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`; static.
    """

    stages: tuple[Stage, ...]
    image_shape: tuple[int, ...] = static()
    report: Report = static()
    info: Info = static(Info())
    backend: str = static("auto")

    def __call__(self, x: ArrayLike) -> Any:
        """Map float images `[N, *image_shape]` to logits, float32 `[N, classes]`.

        Raises:
          ValueError: If the images are of another shape, or sharded over a mesh's
            Explicit axes.
          TypeError: If they are not of floating point numbers; or when differentiated.
        """
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"PackedModel: expected floating point images, got {describe(x)}; "
                "preprocess them as in training"
            )
        if x.shape[1:] != self.image_shape and not self._is_plain:
            sizes = ", ".join(map(str, self.image_shape))
            raise ValueError(f"PackedModel: expected [N, {sizes}], got shape {x.shape}")
        _check_sharding(x)
        return _run(self, x.astype(jnp.float32))

    def with_backend(self, backend: str) -> "PackedModel":
        """The same network on another backend; all give the same integers.

        A real layer before them is rounded by each backend in an order of its own.

        Raises:
          ValueError: If there is no such backend.
          RuntimeError: If it is not available.
        """
        backends.resolve("with_backend", backend)
        return dataclasses.replace(self, backend=backend)

    def __repr__(self) -> str:
        rows, made = self.report.rows, self.report
        binary = sum(row.kind == "binary" for row in rows)
        return (
            f"PackedModel(name={self.info.name!r}, image_shape={self.image_shape}, "
            f"backend={self.backend!r},\n"
            f"  {len(rows)} layers, {binary} of them binary, in {made.bytes_after:,} "
            f"bytes ({made.bytes_before:,} as float32))"
        )

    @property
    def classes(self) -> int | None:
        """How many logits there are; None for a network with its own `__call__`."""
        if self._is_plain:
            return None
        spec = Spec(self.image_shape)
        for stage in self.stages:
            spec = stage.out(spec)
        return spec.shape[-1]

    @property
    def _is_plain(self) -> bool:
        return any(isinstance(stage, plain.Plain) for stage in self.stages)


def _check_sharding(x: jax.Array) -> None:
    sharding = jax.typeof(x).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    if explicit and any(sharding.spec):
        raise ValueError(
            f"PackedModel: expected images sharded over Auto axes, got {sharding.spec} "
            "of a mesh with Explicit ones; make the mesh with axis_types="
            "(jax.sharding.AxisType.Auto,), or call the network in jax.shard_map"
        )


@jax.jit
def _run(packed: PackedModel, x: jax.Array) -> Any:
    if packed._is_plain or x.size == 0:
        return run_stages(packed.stages, x, packed.backend)
    backend = backends.resolve("PackedModel", packed.backend)
    plain = partial(run_stages, backend="xla" if backend == "auto" else backend)
    chained = partial(run_chained, backend=backend)
    return backends.choose(backend, chained, plain, packed.stages, x)


def pack(
    model: nnx.Module,
    mask: Mask = None,
    *,
    example: ArrayLike | None = None,
    backend: str = "auto",
) -> PackedModel:
    """Pack a trained network: one bit a weight, integer sums, thresholds between.

    A network that lists its layers (`xnor_jax.nn.Layered`, such as the `models`, or an
    `nnx.Sequential`) becomes stages: between two binary layers α, bias, ReLU, max-pool
    and BatchNorm fold into one integer threshold a channel, with the very signs that
    the float network computes. Real layers stay real, and `report` names them.

    Any other network keeps its own `__call__`. Its binary layers, and the `nnx.Conv`
    and `nnx.Linear` whose kernels the mask selects, become packed products; what stands
    between them stays float. `example` then shows that the input of each is ±1.

    Evaluation is meant: BatchNorm with its running averages, no dropout. The model is
    left as it is.

    Args:
      model: With float32 parameters, at least one kernel binary.
      mask: Which kernels of `nnx.Conv` and `nnx.Linear` are binary, as for `binarize`:
        a bool tree of the structure of `nnx.state(model, nnx.Param)`, a prefix of one,
        or a callable. None: those of `BinaryConv`, `BinaryLinear` and `XnorBlock`,
        which are always packed.
      example: A batch of inputs. Needed where the model does not tell its
        `image_shape`, or has its own `__call__`.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.

    Returns:
      The packed network.

    Raises:
      ValueError: If something cannot be packed as asked; the message names the layer.
        Nothing that should be packed is left float silently.
      TypeError: If the model has no numbers, or is no `nnx.Module`.
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
      >>> packed = xnor.pack(model, example=jax.numpy.ones((1, 8)))
      >>> packed(jax.numpy.ones((5, 8))).shape
      (5, 10)
      >>> packed.report.rows[1].kind, packed.report.rows[1].bytes_after
      ('binary', 512)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"pack: expected an nnx.Module, got {type(model).__name__}")
    backends.resolve("pack", backend)
    reading.check_numbers(model)
    if not reading.is_sequential(model):
        stage, rows, shape = plain.pack(model, mask, example, backend)
        made = PackedModel(stages=(stage,), image_shape=shape, report=rows)
        return dataclasses.replace(made, backend=backend)
    shape = _image_shape(model, example)
    steps = reading.read(model, mask)
    if all(getattr(step, "scale", None) is None for step in steps):
        raise ValueError(
            "pack: expected a model with a binary layer, got none; give a mask of the "
            "kernels that are binary"
        )
    built = build(steps, shape)
    spec, sizes = Spec(shape), []
    for stage in built:
        sizes.append(stored_bytes(stage, spec))
        spec = stage.out(spec)
    rows = report(built, shape, sizes)
    return PackedModel(stages=built, image_shape=shape, report=rows, backend=backend)


def _image_shape(model: Any, example: ArrayLike | None) -> tuple[int, ...]:
    given = None if example is None else tuple(jnp.shape(example))
    shape = getattr(model, "image_shape", given and given[1:])
    if shape is None:
        raise ValueError(
            "pack: expected an example, a batch of inputs, or an attribute image_shape "
            f"of the model; {type(model).__name__} does not tell the shape of its input"
        )
    shape = tuple(map(int, shape))
    if given is not None and given[1:] != shape:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"pack: expected an example of [N, {sizes}], got {given}")
    return shape
