"""What all stages of a packed network have in common.

A stage holds its arrays as pytree leaves and everything else as static fields. It knows
the shape of what it gives for the shape of what it gets, so that a network is checked
before it is built, and never holds how bits are laid out: that is `xnor_jax.ops`'.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax

from xnor_jax import ops
from xnor_jax.ops import Bits

Value = jax.Array | Bits


class Spec(NamedTuple):
    """What flows between two stages, for one image."""

    shape: tuple[int, ...]  # channels last, without the batch
    bits: bool = False  # packed signs, or float32


def static(default: Any = None) -> Any:
    """A field of the pytree's structure, not a leaf."""
    return field(default=default, metadata={"static": True})


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One step of a packed network.

    Attributes:
      name: The layer's path in the model, such as `block2/layer`.
      parameters: How many parameters of the float model went into this stage.
    """

    kind: ClassVar[str]
    name: str = static("")
    parameters: int = static(0)

    def out(self, spec: Spec) -> Spec:
        """What the stage gives for what it gets.

        Raises:
          ValueError: If it cannot take that.
        """
        raise NotImplementedError

    def __call__(self, x: Any, backend: str) -> Any:
        """Map a batch of what `out` takes to a batch of what it gives."""
        raise NotImplementedError

    def step(self, *, exact: bool) -> ops.steps.Step | None:
        """The same for the compiled library, to run it among others.

        Args:
          exact: Whether a sign follows, which another order of rounding could turn.

        Returns:
          None if the library has no such thing, or rounds as XLA does not.
        """
        return None

    @property
    def weights(self) -> int:
        """How many weights of a kernel the stage holds."""
        return 0

    def macs(self, spec: Spec) -> int:
        """Multiplications and additions for one image."""
        return 0


def check(spec: Spec, *, bits: bool) -> Spec:
    """Refuse bits where floats are wanted, and floats where bits are."""
    if spec.bits != bits:
        names = {True: "bits", False: "floats"}
        raise ValueError(f"expected {names[bits]}, got {names[spec.bits]}")
    return spec
