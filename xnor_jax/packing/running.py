"""Running a packed network's nodes: one by one, or many in one compiled call."""

from collections.abc import Sequence
from typing import Any

import jax

from xnor_jax import ops
from xnor_jax.ops import cpu
from xnor_jax.packing.graph import Node, Spec, as_floats, specs_of


def run_nodes(nodes: Sequence[Node], x: jax.Array, backend: str) -> jax.Array:
    """Map a batch through the nodes.

    Args:
      nodes: The operations to run.
      x: Images, float32 `[N, *image_shape]`.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.
    """
    values: list[Any] = [x]
    for node in nodes:
        values.append(node([values[i] for i in node.inputs], backend))
    return as_floats(values[-1])


def run_chained(nodes: Sequence[Node], x: jax.Array, backend: str) -> jax.Array:
    """The same on the compiled backend, neighbours that it can run in one call.

    Args:
      nodes: The operations to run.
      x: Images, float32 `[N, *image_shape]`, at least one.
      backend: Backend of the nodes that it can only run alone, or not at all.
    """
    specs = specs_of(nodes, x.shape[1:])
    values: list[Any] = [x, *[None] * len(nodes)]
    for first, steps in _segments(nodes, specs):
        last = first + max(1, len(steps)) - 1
        if len(steps) > 1:
            value = values[nodes[first].inputs[0]]
            spec = specs[last + 1]
            values[last + 1] = ops.run_chain(value, steps, spec.shape, bits=spec.bits)
        else:
            node = nodes[first]
            values[first + 1] = node([values[i] for i in node.inputs], backend)
    return as_floats(values[-1])


def _segments(
    nodes: Sequence[Node], specs: Sequence[Spec]
) -> list[tuple[int, list[ops.steps.Step]]]:
    """Where each run of neighbours begins, and its steps; no steps for a single node.

    A run's values are read by the next node alone.
    """
    readers = [0] * len(specs)
    for node in nodes:
        for i in set(node.inputs):
            readers[i] += 1
    largest = cpu.RANK + 1  # axes of an image, the channels among them
    last_bits = max((at for at, spec in enumerate(specs) if spec.bits), default=0)
    segments: list[tuple[int, list[ops.steps.Step]]] = []
    for at, node in enumerate(nodes):
        inputs = [specs[i] for i in node.inputs]
        shapes = [spec.shape for spec in (*inputs, specs[at + 1])]
        step = None
        if len(inputs) == 1 and all(1 <= len(shape) <= largest for shape in shapes):
            step = node.step(inputs, exact=at < last_bits - 1)
        follows = node.inputs == (at,) and readers[at] == 1
        if step is not None and follows and segments and segments[-1][1]:
            segments[-1][1].append(step)
        else:
            segments.append((at, [] if step is None else [step]))
    return segments
