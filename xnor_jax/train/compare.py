"""Comparison of runs: a table of their accuracies and a figure of their curves."""

import dataclasses
import json
import os.path
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

_SHORT = 40  # characters of a label that fits into a legend


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in their seeds.

    Attributes:
      label: The settings that distinguish it from the other groups.
      place: The first run's folder, relative to the folder that holds all groups, and
        the number of further runs.
      histories: One history per run, with one record per epoch.
      binary: Whether the networks have binary weights, not the float twins.
    """

    label: str
    place: str
    histories: tuple[list[dict[str, Any]], ...]
    binary: bool = True

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
    places = [str(rows[0][0]) for rows in found.values()]
    parent = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in places])
    groups = []
    for rows in found.values():
        place, fields, _ = rows[0]
        alike = [other for other in every if other["name"] == fields["name"]]
        preset = recipes.PRESETS.get(fields["name"])
        usual = alike[0] if preset is None else recipes.to_json(preset)
        # The name stands for its recipe's own settings.
        words = [
            _setting(key, fields[key])
            for key in differ
            if key in fields
            and (
                key == "name"
                or any(other.get(key) != fields[key] for other in (*alike, usual))
            )
        ]
        label = ", ".join(words) or str(place if len(rows) == 1 else fields["name"])
        histories = tuple(history for *_, history in rows)
        binary = fields.get("binary", True) and fields.get("precision") != "32w1a"
        short = os.path.relpath(place, parent)
        if len(rows) > 1:
            short += f" and {len(rows) - 1} more"
        groups.append(Group(label, short, histories, binary))
    return groups


def _setting(key: str, value: Any) -> str:
    if key in ("name", *recipes.PARTS):
        return str(value)
    if value is True:
        return key
    return f"no {key}" if value in (False, None, []) else f"{key} {value}"


def _are_short(groups: Sequence[Group]) -> bool:
    return all(len(group.label) <= _SHORT for group in groups)


def table(groups: Sequence[Group]) -> Table:
    """Tabulate accuracies by group: mean ± sample standard deviation over its seeds.

    Each row has its group's label, after the folder where the figure's legend has that.
    """
    short = _are_short(groups)
    result = make_table()
    result.add_column("run", overflow="fold", max_width=30)
    for column in ("seeds", "epochs", "last, %", "best, %", "training, %"):
        result.add_column(column, justify="right", no_wrap=True)
    for group in groups:
        epochs = sorted({len(history) for history in group.histories})
        result.add_row(
            group.label if short else f"{group.place}: {group.label}",
            str(len(group.histories)),
            "–".join(map(str, dict.fromkeys((epochs[0], epochs[-1])))),
            _spread(group.values("test_accuracy")),
            _spread(group.best),
            _spread(group.values("train_accuracy")),
        )
    return result


def picture(groups: Sequence[Group]) -> Any:
    """Plot test error, test loss and flip ratio: mean and range over the seeds.

    The legend has the groups' labels, or their folders if a label is long. Float twins
    have no flip ratio.

    Returns:
      A matplotlib figure.
    """
    short = _are_short(groups)
    most = max(len(history) for group in groups for history in group.histories)
    figure = figures.make_figure(13, 4.2)
    axes = figure.subplots(1, 3)
    curves = (
        ("test error, %", lambda e: 100 - 100 * e["test_accuracy"]),
        ("test loss", lambda e: e["test_loss"]),
        ("sign flips per step, share of the weights", lambda e: e["flip_ratio"]),
    )
    for axis, (title, value) in zip(axes, curves, strict=True):
        for color, group in enumerate(groups):
            if axis is axes[2] and not group.binary:
                continue
            epochs = min(map(len, group.histories))
            rows = np.array([[value(e) for e in h[:epochs]] for h in group.histories])
            at = np.arange(1, epochs + 1)
            look = {"color": f"C{color}"} | figures.markers(epochs)
            label = figures.plain(group.label if short else group.place)
            axis.plot(at, rows.mean(0), label=label, **look)
            if len(rows) > 1:
                low, high = rows.min(0), rows.max(0)
                axis.fill_between(at, low, high, color=look["color"], alpha=0.2)
        axis.set(title=title)
        figures.mark_epochs(axis, most)
        if axis.get_lines():
            figures.scale(axis)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    return figure


def _spread(shares: Sequence[float]) -> str:
    percent = [100 * share for share in shares]
    mean = f"{statistics.fmean(percent):.2f}"
    return mean if len(percent) == 1 else f"{mean} ± {statistics.stdev(percent):.2f}"
