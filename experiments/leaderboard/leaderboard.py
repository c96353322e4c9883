"""LeNet-5 on Fashion-MNIST in 20 epochs, with one choice changed at a time.

    python leaderboard.py DATA_DIR RUNS

trains each cell that results.jsonl does not have, seed by seed. It can be stopped at
any time; an unfinished run in RUNS is resumed. Each finished run is a line of
results.jsonl. --cells and --seeds select some of them.

    python leaderboard.py

prints the table from these lines and draws leaderboard.png.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from cells import CELLS, EPOCHS

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"


def cells() -> Iterator[tuple[str, str, str]]:
    """Of each cell: what is chosen, its name, its options."""
    for kind, choices in CELLS.items():
        for name, options in choices.items():
            yield kind, name, options


def results() -> dict[tuple[str, int], dict]:
    """The finished runs of the present cells, by name and seed."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    now = {name: (options, EPOCHS) for _, name, options in cells()}
    return {
        (r["cell"], r["seed"]): r
        for r in map(json.loads, lines)
        if now.get(r["cell"]) == (r["options"], len(r["test_accuracy"]))
    }


def folder(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def epochs(run: Path) -> list[dict]:
    """The metrics of each finished epoch of a run."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def train(name: str, options: str, seed: int, data_dir: Path, runs: Path) -> None:
    """Train a cell with a seed, from where it stopped, and write its missing line."""
    run = runs / folder(name) / f"seed{seed}"
    for other in re.findall(r"{runs}/([\w-]+)/", options):
        if len(epochs(runs / other / f"seed{seed}")) < EPOCHS:
            needed, given = next((n, o) for _, n, o in cells() if folder(n) == other)
            train(needed, given, seed, data_dir, runs)
    filled = [word.format(runs=runs, seed=seed) for word in options.split()]
    command = ["xnor-jax", "train", "fashion-lenet5", "--epochs", str(EPOCHS)]
    command += ["--seed", str(seed), *filled]
    begun = (run / "recipe.json").exists()
    where = ["--data-dir", str(data_dir), "--output", str(run)]
    start = time.monotonic()
    print("$", *command, flush=True)
    more = [*where, "--resume"] if begun else where
    subprocess.run([*command, *more], cwd=HERE, check=True)
    seconds = time.monotonic() - start
    if (name, seed) in results():  # needed by another cell
        return
    found = epochs(run)
    result = {
        "cell": name,
        "seed": seed,
        "options": options,
        "device": jax.devices()[0].device_kind,
        "seconds": None if begun else round(seconds),
        "train_accuracy": round(found[-1]["train_accuracy"], 5),
        "flip_ratio": round(found[-1]["flip_ratio"], 8),
        "test_accuracy": [round(epoch["test_accuracy"], 4) for epoch in found],
    }
    with RESULTS.open("a") as file:
        print(json.dumps(result), file=file)


def rows() -> list[tuple[str, str, list[float], list[float], str]]:
    """Of each cell that has a run: kind, name, last and best of each seed, in %."""
    found = results()
    made = []
    for kind, name, options in cells():
        each = [r["test_accuracy"] for (cell, _), r in found.items() if cell == name]
        if each:
            last = [100 * accuracies[-1] for accuracies in each]
            best = [100 * max(accuracies) for accuracies in each]
            made.append((kind, name, last, best, options))
    return made


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table() -> str:
    lines = ["| choice | | seeds | last, % | best, % | options |"]
    lines.append("|---|---|---|---|---|---|")
    for kind, name, last, best, options in rows():
        cells = [kind, name, str(len(last)), f"**{spread(last)}**", spread(best)]
        lines.append(f"| {' | '.join([*cells, f'`{options}`' if options else ''])} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Each seed a point, each mean a bar across, kind by kind."""
    from matplotlib.figure import Figure

    made = rows()
    figure = Figure(figsize=(7.5, 1 + 0.27 * len(made)), layout="constrained")
    axis = figure.subplots()
    kinds = list(CELLS)
    for at, (kind, _, last, _, _) in enumerate(made):
        color = f"C{kinds.index(kind)}"
        axis.plot(last, [at] * len(last), "o", color=color, alpha=0.5)
        axis.plot([statistics.fmean(last)], [at], "|", color=color, ms=16, mew=2)
    axis.axvline(statistics.fmean(made[0][2]), color="0.7", lw=1, zorder=0)
    axis.set_yticks(range(len(made)), [f"{kind}: {name}" for kind, name, *_ in made])
    axis.invert_yaxis()
    axis.set_xlabel(f"test accuracy of the last of {EPOCHS} epochs, %")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = [name for _, name, _ in cells()]
    parser.add_argument(
        "--cells", nargs="+", choices=names, default=names, metavar="CELL"
    )
    args = parser.parse_args()
    if (args.data_dir is None) != (args.runs is None):
        parser.error("expected DATA_DIR and RUNS, or neither")
    if args.data_dir:
        data_dir, runs = args.data_dir.resolve(), args.runs.resolve()
        for seed in args.seeds:
            for _, name, options in cells():
                if name in args.cells and (name, seed) not in results():
                    train(name, options, seed, data_dir, runs)
    if not results():
        sys.exit("no run is done yet; give DATA_DIR and RUNS to train")
    print(table())
    draw(HERE / "leaderboard.png")


if __name__ == "__main__":
    main()
