"""Running the stages of a packed network: one by one, or many in one compiled call."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import jax

from xnor_jax import ops
from xnor_jax.deploy.stage import Spec, Stage
from xnor_jax.ops import Bits, cpu


def run_stages(stages: Sequence[Stage], x: Any, backend: str) -> Any:
    """Map a batch through one stage after another.

    Args:
      stages: What to run.
      x: What the first one takes.
      backend: `"auto"`, or one of `xnor_jax.ops.available_backends()`.
    """
    for stage in stages:
        x = stage(x, backend)
    return x


def run_chained(stages: Sequence[Stage], x: jax.Array, backend: str) -> Any:
    """The same on the compiled backend, neighbours that it can run in one call.

    Args:
      stages: What to run.
      x: Images, float32 `[N, *spatial, C]`, at least one.
      backend: For the stages that it can only run alone, or not at all.
    """
    specs = [Spec(x.shape[1:])]
    for stage in stages:
        specs.append(stage.out(specs[-1]))
    largest = cpu.RANK + 1  # axes of an image, the channels among them
    last_bits = max(at for at, spec in enumerate(specs) if spec.bits or at == 0)
    plan = []
    for at, (before, after) in enumerate(pairwise(specs)):
        fits = max(len(before.shape), len(after.shape)) <= largest
        step = stages[at].step(exact=at < last_bits) if fits else None
        plan.append((stages[at], step, after))
    value: jax.Array | Bits = x
    for chained, group in groupby(plan, lambda entry: entry[1] is not None):
        run = list(group)
        if chained:
            after = run[-1][2]
            steps = [step for _, step, _ in run if step is not None]
            value = ops.run_chain(value, steps, after.shape, bits=after.bits)
        else:
            value = run_stages([stage for stage, _, _ in run], value, backend)
    return value
