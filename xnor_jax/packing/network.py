"""A trained network at one bit per weight, as a pytree that runs on bits."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from xnor_jax._kernel import describe
from xnor_jax.ops import backends
from xnor_jax.packing.graph import Node, specs_of
from xnor_jax.packing.report import Report, report
from xnor_jax.packing.running import run_compiled, run_nodes


@dataclass(frozen=True)
class Preprocessing:
    """Normalization of pixels as in training: `(x / 255 − mean) / std`.

    Attributes:
      mean: Mean of the pixels scaled to [0, 1], one per channel.
      std: Standard deviation of the scaled pixels, one per channel, above 0.
      resize: Length to which a picture's shorter side is resized before its centre is
        cropped to the network's image size; None resizes to that size, regardless of
        the aspect ratio.
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
    """A network's metadata, stored in its file.

    Attributes:
      name: The network's name, such as the recipe's.
      preprocessing: Normalization of the pixels, if known.
      class_names: One per logit; empty if not known.
      test_accuracy: From 0 to 1, measured when the network was packed.
      dataset: Name of the training data set in `xnor_jax.data`.
    """

    name: str | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    test_accuracy: float | None = None
    dataset: str | None = None


def _static(default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class PackedModel:
    """A packed network: a pytree of packed kernels, thresholds and float arrays.

    Call it on float images to get logits. `jax.jit`, `jax.vmap`, `jax.shard_map` and
    inputs sharded over a mesh's Auto axes work: each device computes its own images.
    The network is not differentiable.

    Attributes:
      nodes: The operations in order; see `xnor_jax.packing.graph`.
      image_shape: The input's shape without the batch; static.
      info: The network's metadata; static.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`; static.
    """

    nodes: tuple[Node, ...]
    image_shape: tuple[int, ...] = _static()
    info: Info = _static(Info())
    backend: str = _static("auto")

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Map float images `[N, *image_shape]` to logits, float32 `[N, classes]`.

        Raises:
          ValueError: If the images have another shape, or are sharded over a mesh's
            Explicit axes.
          TypeError: If the images are not floating point, or when differentiated.
        """
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"PackedModel: expected floating point images, got {describe(x)}; "
                "preprocess them as in training"
            )
        if x.ndim < 1 or x.shape[1:] != self.image_shape:
            sizes = ", ".join(map(str, self.image_shape))
            raise ValueError(f"PackedModel: expected [N, {sizes}], got shape {x.shape}")
        _check_sharding(x)
        return _run(self, x.astype(jnp.float32))

    def with_backend(self, backend: str) -> "PackedModel":
        """Return the same network on another backend; all give the same integers.

        A float layer before them may round differently: backends differ in the order of
        their sums.

        Raises:
          ValueError: If there is no such backend.
          RuntimeError: If it is not available.
        """
        backends.resolve("with_backend", backend)
        return dataclasses.replace(self, backend=backend)

    @property
    def report(self) -> Report:
        """Sizes and MACs, one row per layer."""
        return report(self.nodes, self.image_shape)

    @property
    def classes(self) -> int:
        """The number of logits: the size of the result's last axis."""
        return specs_of(self.nodes, self.image_shape)[-1].shape[-1]

    def __repr__(self) -> str:
        binary = sum(row.kind == "binary" for row in self.report.rows)
        return (
            f"PackedModel({self.info.name or 'unnamed'}: image_shape="
            f"{self.image_shape}, {len(self.nodes)} nodes, {binary} of "
            f"{len(self.report.rows)} layers binary, {self.report.bytes_after:,} bytes,"
            f" backend={self.backend!r})"
        )


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
def _run(packed: PackedModel, x: jax.Array) -> jax.Array:
    backend = backends.resolve("PackedModel", packed.backend)
    others = "xla" if backend in ("auto", "cpu") else backend
    portable = partial(run_nodes, backend=others)
    # Products of real numbers default to TF32 on a GPU and to bfloat16 on a TPU, whose
    # rounding would change signs.
    with jax.default_matmul_precision("highest"):
        if x.size == 0:
            return portable(packed.nodes, x)
        return backends.choose(backend, run_compiled, portable, packed.nodes, x)
