"""Networks that run their layers in order.

`xnor_jax.pack` can read such a network, because the order of execution stands in one
place: what `layers()` lists is what runs.
"""

from collections.abc import Callable, Sequence

import jax
from flax import nnx


class Layered(nnx.Module):
    """A network whose layers run one after another.

    A subclass sets `image_shape`, says in `layers()` what runs, and leaves `__call__`
    alone. Then `xnor_jax.pack` reads it; what it knows are `XnorBlock`, `BinaryConv`,
    `BinaryLinear`, `Conv`, `BatchNorm`, Flax's `nnx.Conv`, `nnx.Linear`,
    `nnx.BatchNorm`, `nnx.Dropout` and `nnx.relu`, `sign_ste`, the pools, `Flatten`, and
    networks of these. A plain `nnx.Sequential` of them can be packed as well.

    Attributes:
      image_shape: The input's shape without the batch, such as (height, width,
        channels).

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
        """What runs, in this order: modules and functions of one array."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method layers()")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images `[N, *image_shape]` to logits `[N, classes]`."""
        names = {id(value): name for name, value in vars(self).items()}
        for layer in self.layers():
            # So that a profile of the compiled program tells the layers apart.
            with jax.named_scope(names.get(id(layer)) or _name(layer)):
                x = layer(x)
        return x


def _name(layer: Callable[..., jax.Array]) -> str:
    return getattr(layer, "__name__", type(layer).__name__)
