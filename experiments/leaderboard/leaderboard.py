"""Networks trained for a few epochs, with one choice changed at a time.

    python leaderboard.py BOARD DATA_DIR RUNS

trains each cell of a board, such as fashion, that BOARD.jsonl does not have, seed by
seed. It can be stopped at any time; an unfinished run in RUNS is resumed. Each finished
run is a line of BOARD.jsonl. --cells and --seeds select some of them.

    python leaderboard.py BOARD

prints the table from these lines and draws BOARD.png.
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
from cells import BOARDS

HERE = Path(__file__).parent


def cells(board: str) -> Iterator[tuple[str, str, str]]:
    """Of each cell: what is chosen, its name, its options."""
    for kind, choices in BOARDS[board].cells.items():
        for name, options in choices.items():
            yield kind, name, options


def results(board: str) -> dict[tuple[str, int], dict]:
    """The finished runs of the present cells, by name and seed."""
    path = HERE / f"{board}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    now = {name: (options, BOARDS[board].epochs) for _, name, options in cells(board)}
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


def train(
    board: str, name: str, options: str, seed: int, data_dir: Path, runs: Path
) -> None:
    """Train a cell with a seed, from where it stopped, and write its missing line."""
    run = runs / folder(name) / f"seed{seed}"
    for other in re.findall(r"{runs}/([\w-]+)/", options):
        if len(epochs(runs / other / f"seed{seed}")) < BOARDS[board].epochs:
            needed, given = next(
                (n, o) for _, n, o in cells(board) if folder(n) == other
            )
            train(board, needed, given, seed, data_dir, runs)
    filled = [word.format(runs=runs, seed=seed) for word in options.split()]
    recipe, count, _ = BOARDS[board]
    command = ["xnor-jax", "train", *recipe.split(), "--epochs", str(count)]
    command += ["--seed", str(seed), *filled]
    begun = (run / "recipe.json").exists()
    where = ["--data-dir", str(data_dir), "--output", str(run)]
    start = time.monotonic()
    print("$", *command, flush=True)
    more = [*where, "--resume"] if begun else where
    subprocess.run([*command, *more], cwd=HERE, check=True)
    seconds = time.monotonic() - start
    if (name, seed) in results(board):  # needed by another cell
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
    with (HERE / f"{board}.jsonl").open("a") as file:
        print(json.dumps(result), file=file)


def rows(board: str) -> list[tuple[str, str, list[float], list[float], str]]:
    """Of each cell that has a run: kind, name, last and best of each seed, in %."""
    found = results(board)
    made = []
    for kind, name, options in cells(board):
        each = [r["test_accuracy"] for (cell, _), r in found.items() if cell == name]
        if each:
            last = [100 * accuracies[-1] for accuracies in each]
            best = [100 * max(accuracies) for accuracies in each]
            made.append((kind, name, last, best, options))
    return made


def spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table(board: str) -> str:
    lines = ["| choice | | seeds | last, % | best, % | options |"]
    lines.append("|---|---|---|---|---|---|")
    for kind, name, last, best, options in rows(board):
        cells = [kind, name, str(len(last)), f"**{spread(last)}**", spread(best)]
        lines.append(f"| {' | '.join([*cells, f'`{options}`' if options else ''])} |")
    return "\n".join(lines)


def draw(board: str) -> None:
    """Each seed a point, each mean a bar across, kind by kind."""
    from matplotlib.figure import Figure

    made = rows(board)
    figure = Figure(figsize=(7.5, 1 + 0.27 * len(made)), layout="constrained")
    axis = figure.subplots()
    kinds = list(BOARDS[board].cells)
    for at, (kind, _, last, _, _) in enumerate(made):
        color = f"C{kinds.index(kind)}"
        axis.plot(last, [at] * len(last), "o", color=color, alpha=0.5)
        axis.plot([statistics.fmean(last)], [at], "|", color=color, ms=16, mew=2)
    axis.axvline(statistics.fmean(made[0][2]), color="0.7", lw=1, zorder=0)
    axis.set_yticks(range(len(made)), [f"{kind}: {name}" for kind, name, *_ in made])
    axis.invert_yaxis()
    count = BOARDS[board].epochs
    axis.set_xlabel(f"test accuracy of the last of {count} epochs, %")
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(HERE / f"{board}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("board", choices=BOARDS)
    parser.add_argument("data_dir", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", metavar="CELL")
    args = parser.parse_args()
    board = args.board
    names = [name for _, name, _ in cells(board)]
    if unknown := set(args.cells or ()) - set(names):
        parser.error(f"--cells: {', '.join(unknown)}: expected {', '.join(names)}")
    if (args.data_dir is None) != (args.runs is None):
        parser.error("expected DATA_DIR and RUNS, or neither")
    if args.data_dir:
        data_dir, runs = args.data_dir.resolve(), args.runs.resolve()
        for seed in args.seeds:
            for _, name, options in cells(board):
                chosen = args.cells is None or name in args.cells
                if chosen and (name, seed) not in results(board):
                    train(board, name, options, seed, data_dir, runs)
    if not results(board):
        sys.exit("no run is done yet; give DATA_DIR and RUNS to train")
    print(table(board))
    draw(board)


if __name__ == "__main__":
    main()
