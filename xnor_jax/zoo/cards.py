"""Model cards of packed networks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xnor_jax.packing import Info


@dataclass(frozen=True, kw_only=True)
class Card:
    """A packed network's card; `str(card)` is Markdown.

    Attributes:
      name: The network's name, such as its recipe's.
      bytes: Size of the packed file.
      dataset: Name of the training data set in `xnor_jax.data`.
      test_accuracy: Test accuracy of the packed network, in [0, 1]; in the zoo, that
        of the last epoch.
      classes: One name per logit.
      command: The command that trained it.
      seed: The run's seed.
      license: The file's license, by its identifier on the hub.
      note: What to know about the accuracy.
    """

    name: str
    bytes: int
    dataset: str | None = None
    test_accuracy: float | None = None
    classes: tuple[str, ...] = ()
    command: str | None = None
    seed: int | None = None
    license: str | None = None
    note: str | None = None

    @classmethod
    def of(cls, info: "Info", size: int) -> "Card":
        """Make the card of a packed file from its metadata and its size."""
        return cls(
            name=info.name or "packed network",
            bytes=size,
            dataset=info.dataset,
            test_accuracy=info.test_accuracy,
            classes=info.class_names,
        )

    def __str__(self) -> str:
        accuracy = self.test_accuracy
        facts = {
            "Data set": self.dataset,
            "Test accuracy": None if accuracy is None else f"{accuracy:.2%}",
            "Classes": ", ".join(self.classes),
            "Trained by": self.command and f"`{self.command}`",
            "Seed": None if self.seed is None else str(self.seed),
            "Size": f"{self.bytes:,} bytes",
            "Licence": self.license,
            "Note": self.note,
        }
        lines = [f"- {name}: {value}" for name, value in facts.items() if value]
        about = "An XNOR-Network, packed at one bit per binary weight by xnor_jax."
        return "\n".join([f"# {self.name}", "", about, "", *lines])
