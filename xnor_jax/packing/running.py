"""Execution of a packed network's nodes: one by one, or in one call of the engine."""

import json
from collections.abc import Sequence
from typing import Any

import jax

from xnor_jax import ops
from xnor_jax.packing.graph import Node, as_floats, specs_of

# Settings that describe a node's origin and do not change the program.
_METADATA = ("name", "parameters")


def run_nodes(nodes: Sequence[Node], x: jax.Array, backend: str) -> jax.Array:
    """Run the nodes one by one on a batch.

    Args:
      nodes: The operations to run.
      x: Images, float32 `[N, *image_shape]`.
      backend: One of `xnor_jax.ops.available_backends()`.
    """
    values: list[Any] = [x]
    for node in nodes:
        values.append(node([values[i] for i in node.inputs], backend))
    return as_floats(values[-1])


def run_compiled(nodes: Sequence[Node], x: jax.Array) -> jax.Array:
    """Run the nodes in one call of the engine; equal to `run_nodes` up to rounding.

    Args:
      nodes: The operations to run.
      x: Images, float32 `[N, *image_shape]`, at least one.
    """
    specs = specs_of(nodes, x.shape[1:])
    found, arrays = [], []
    for node in nodes:
        names = node.members([specs[i] for i in node.inputs])
        arrays += [node.arrays[name] for name in names]
        found.append({k: v for k, v in node.to_json().items() if k not in _METADATA})
    text = json.dumps(found, separators=(",", ":"))
    return ops.run_network(x, text, arrays, specs[-1].shape)
