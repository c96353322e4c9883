"""Comparison of runs: a table of their accuracies and a figure of their curves."""

import dataclasses
import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from xnor_jax.packing.tables import make_table
from xnor_jax.train import figures
from xnor_jax.train import folder as folders
from xnor_jax.train import recipe as recipes
from xnor_jax.train.folder import RunError, RunWarning


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in their seeds.

    Attributes:
      label: The settings that distinguish it from the other groups.
      histories: One history per run, with one record per epoch.
    """

    label: str
    histories: tuple[list[dict[str, Any]], ...]

    def values(self, key: str) -> list[float]:
        """The value of `key` in the last epoch of each run."""
        return [history[-1][key] for history in self.histories]

    @property
    def best(self) -> list[float]:
        """The highest test accuracy of each run."""
        return [max(e["test_accuracy"] for e in history) for history in self.histories]


def read(runs: Sequence[Path]) -> list[Group]:
    """Read runs, and group those that differ only in their seeds.

    Their recipes may have custom parts that cannot be imported, and options of other
    versions.

    Args:
      runs: Folders of single runs, or of the runs of several seeds.

    Raises:
      RunError: If one is not a run, is damaged, has no epoch yet, or is given twice.
    """
    found: dict[str, list[tuple[Path, dict[str, Any], Any]]] = {}
    order = "name", *(field.name for field in dataclasses.fields(recipes.Recipe))
    for run in runs:
        seeds = [run / f"seed{seed}" for seed in folders.read_seeds(run)]
        for place in [path for path in seeds if path.exists()] or [run]:
            fields = folders.read_fields(place)
            del fields["data"], fields["modules"], fields["inputs"]
            fields = {key: fields[key] for key in order} | fields
            same = json.dumps({k: v for k, v in fields.items() if k != "seed"})
            row = place, fields, folders.read_metrics(place)
            for other, those, _ in found.get(same, ()):
                if place.samefile(other):
                    raise RunError(f"{place} is given twice; expected each run once")
                if (seed := fields["seed"]) == those["seed"]:
                    warnings.warn(
                        f"{other} and {place} have the same seed, {seed}; their spread "
                        "is not that over seeds",
                        RunWarning,
                        stacklevel=2,
                    )
            found.setdefault(same, []).append(row)
    every = [rows[0][1] for rows in found.values()]
    differ = [
        key
        for key in dict.fromkeys(key for fields in every for key in fields)
        if key != "seed" and len({json.dumps(fields.get(key)) for fields in every}) > 1
    ]
    named = ("name", *recipes.PARTS)  # Their values need no label.
    groups = []
    for rows in found.values():
        place, fields, _ = rows[0]
        words = [
            str(fields[key]) if key in named else f"{key} {fields[key]}"
            for key in differ
            if key in fields
        ]
        label = ", ".join(words) or str(place if len(rows) == 1 else fields["name"])
        groups.append(Group(label, tuple(history for *_, history in rows)))
    return groups


def table(groups: Sequence[Group]) -> Table:
    """Tabulate accuracies by group: mean ± sample standard deviation over its seeds."""
    result = make_table()
    result.add_column("run", overflow="fold", max_width=30)
    for column in ("seeds", "epochs", "last, %", "best, %", "training, %"):
        result.add_column(column, justify="right", no_wrap=True)
    for group in groups:
        epochs = sorted({len(history) for history in group.histories})
        result.add_row(
            group.label,
            str(len(group.histories)),
            "–".join(map(str, dict.fromkeys((epochs[0], epochs[-1])))),
            _spread(group.values("test_accuracy")),
            _spread(group.best),
            _spread(group.values("train_accuracy")),
        )
    return result


def picture(groups: Sequence[Group]) -> Any:
    """Plot test error, test loss and flip ratio: mean and range over the seeds.

    Returns:
      A matplotlib figure.
    """
    figure = figures.make_figure(13, 4.2)
    axes = figure.subplots(1, 3)
    curves = (
        ("test error, %", lambda e: 100 - 100 * e["test_accuracy"]),
        ("test loss", lambda e: e["test_loss"]),
        ("sign flips per step, share of the weights", lambda e: e["flip_ratio"]),
    )
    for axis, (title, value) in zip(axes, curves, strict=True):
        for group in groups:
            epochs = min(map(len, group.histories))
            rows = np.array([[value(e) for e in h[:epochs]] for h in group.histories])
            at = np.arange(1, epochs + 1)
            marker = "o" if epochs == 1 else None
            (line,) = axis.plot(at, rows.mean(0), label=group.label, marker=marker)
            if len(rows) > 1:
                low, high = rows.min(0), rows.max(0)
                axis.fill_between(at, low, high, color=line.get_color(), alpha=0.2)
        axis.set(title=title, xlabel="epoch")
        figures.scale(axis)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    return figure


def _spread(shares: Sequence[float]) -> str:
    percent = [100 * share for share in shares]
    mean = f"{statistics.fmean(percent):.2f}"
    return mean if len(percent) == 1 else f"{mean} ± {statistics.stdev(percent):.2f}"
