"""A packed network in one call of the compiled engine."""

from collections.abc import Sequence

import jax

from xnor_jax.ops import _inference, cpu
from xnor_jax.ops.kernel import PackedKernel


def run_network(
    x: jax.Array,
    nodes: str,
    arrays: Sequence[jax.Array | PackedKernel],
    shape: tuple[int, ...],
) -> jax.Array:
    """Run a packed network's graph, without returning to XLA between its nodes.

    Args:
      x: float32 images `[N, *image_shape]`, `N ≥ 1`.
      nodes: A list of nodes in JSON, as in a file; see `xnor_jax.packing.graph`.
      arrays: The arrays of each node in turn, in the order of its members.
      shape: The result's shape, without the batch axis.

    Returns:
      float32 `[N, *shape]`.

    Raises:
      RuntimeError: If the library was not built.
      TypeError: When differentiated.
    """
    x, leaves = _inference.no_gradient("PackedModel", (x, jax.tree.leaves(arrays)))
    return cpu.run_network(x, nodes, leaves, shape)
