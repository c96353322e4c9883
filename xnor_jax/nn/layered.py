"""A base class for networks whose layers run one after another."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx


class Layered(nnx.Module):
    """A network whose layers run one after another.

    A subclass sets `image_shape` and lists its layers in `layers()`. `__call__` runs
    them in that order, each under its own name in profiles and in errors of
    `xnor_jax.pack`. This is a convenience: any `nnx.Module` can be trained and packed.

    Attributes:
      image_shape: The input's shape without the batch axis, such as (height, width,
        channels). With it, `xnor_jax.pack` needs no example.

    Examples:
      >>> import jax, xnor_jax as xnor
      >>> from flax import nnx
      >>> class Net(xnor.nn.Layered):
      ...     def __init__(self, rngs):
      ...         self.image_shape = (8, 8, 3)
      ...         self.conv1 = xnor.nn.Conv(3, 32, (3, 3), rngs=rngs)
      ...         self.block2 = xnor.nn.XnorBlock(32, 64, (3, 3), rngs=rngs)
      ...         self.dense3 = nnx.Linear(64, 10, rngs=rngs)
      ...
      ...     def layers(self):
      ...         pool = xnor.nn.MaxPool(2, 2)
      ...         mean = xnor.nn.GlobalAveragePool()
      ...         return self.conv1, nnx.relu, pool, self.block2, mean, self.dense3
      >>> Net(nnx.Rngs(0))(jax.numpy.ones((5, 8, 8, 3))).shape
      (5, 10)
    """

    image_shape: tuple[int, ...]

    def layers(self) -> Sequence[Callable[[jax.Array], jax.Array]]:
        """The layers in order: modules and functions of one array."""
        raise TypeError(
            f"{type(self).__name__}: expected a method layers() that lists the layers "
            "in order"
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[N, *image_shape]` to logits `[N, classes]`."""
        names = {id(value): name for name, value in vars(self).items()}
        for layer in self.layers():
            # Names the layer in profiles and in errors of `xnor_jax.pack`.
            with jax.named_scope(names.get(id(layer)) or _name(layer)):
                x = layer(x)
        return x


def _name(layer: Callable[..., jax.Array]) -> str:
    return getattr(layer, "__name__", type(layer).__name__)
