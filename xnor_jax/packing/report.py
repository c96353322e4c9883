"""A packed network's sizes and MACs: one row per layer."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xnor_jax.packing.graph import BinaryConv, Node, specs_of


@dataclass(frozen=True)
class Row:
    """A layer with weights, and the nodes after it up to the next such layer.

    Attributes:
      name: The layer's path in the model.
      kind: `"binary"` if the weights are signs, else `"real"`.
      bits: Bits per weight.
      weights: Number of weights in the kernel.
      bytes_before: Bytes of the layer's parameters in the float model, 4 each: kernel,
        bias and the BatchNorms folded into it.
      bytes_after: Bytes of the layer's arrays in the file.
      binary_macs: Multiply-accumulates of signs, for one image.
      real_macs: Multiply-accumulates of floats, for one image.
      output: Whether the next layer reads bits or floats.
    """

    name: str
    kind: Literal["binary", "real"]
    bits: int
    weights: int
    bytes_before: int
    bytes_after: int
    binary_macs: int
    real_macs: int
    output: Literal["bits", "float"]


@dataclass(frozen=True)
class Report:
    """One row per layer, in the order of execution; `str(report)` is a table.

    Attributes:
      rows: The layers with weights.
    """

    rows: tuple[Row, ...]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters of the float model, 4 each."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all arrays in the file, without its header."""
        return sum(row.bytes_after for row in self.rows)

    def table(self) -> list[tuple[str, ...]]:
        """The report as strings: titles, one line per row, and totals."""
        titles = ("layer", "kind", "bits", "weights", "bytes before", "after")
        lines: list[tuple[str, ...]] = [(*titles, "binary MACs", "real MACs", "output")]
        for row in self.rows:
            numbers = (row.bytes_before, row.bytes_after, row.binary_macs)
            lines.append(
                (
                    *(row.name, row.kind, str(row.bits), f"{row.weights:,}"),
                    *(f"{number:,}" for number in (*numbers, row.real_macs)),
                    row.output,
                )
            )
        sums = (
            self.bytes_before,
            self.bytes_after,
            sum(row.binary_macs for row in self.rows),
            sum(row.real_macs for row in self.rows),
        )
        binary = sum(row.kind == "binary" for row in self.rows)
        weights = sum(row.weights for row in self.rows)
        lines.append(
            (
                *(f"{binary} of {len(self.rows)} binary", "", "", f"{weights:,}"),
                *(f"{number:,}" for number in sums),
                "",
            )
        )
        return lines

    def __str__(self) -> str:
        lines = self.table()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = {0, 1, 8}
        text = [
            "  ".join(
                cell.ljust(width) if at in left else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "─" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def report(nodes: Sequence[Node], image_shape: tuple[int, ...]) -> Report:
    """Compute a packed network's report.

    Nodes without weights count towards the layer before them; before the first layer,
    towards that layer.

    Args:
      nodes: The network's operations.
      image_shape: The input's shape without the batch.
    """
    rows: list[Row] = []
    before = after = real = 0  # of the nodes before the first layer with weights
    specs = specs_of(nodes, image_shape)
    for node, spec in zip(nodes, specs[1:], strict=True):
        inputs = [specs[i] for i in node.inputs]
        macs = node.macs(inputs)
        output = "bits" if spec.bits else "float"
        before += 4 * node.parameters
        after += sum(m.stored_bytes for m in node.members(inputs).values())
        binary = isinstance(node, BinaryConv)
        real += 0 if binary else macs
        if node.weights:
            rows.append(
                Row(
                    name=node.name,
                    kind="binary" if binary else "real",
                    bits=1 if binary else 32,
                    weights=node.weights,
                    bytes_before=before,
                    bytes_after=after,
                    binary_macs=macs if binary else 0,
                    real_macs=real,
                    output=output,
                )
            )
        elif rows:
            last = rows[-1]
            rows[-1] = dataclasses.replace(
                last,
                bytes_before=last.bytes_before + before,
                bytes_after=last.bytes_after + after,
                real_macs=last.real_macs + real,
                output=output,
            )
        else:
            continue
        before = after = real = 0
    return Report(tuple(rows))
