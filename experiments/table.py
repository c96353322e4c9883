"""Print the results table of a folder of runs: `python table.py mnist_lenet5`."""

import json
import sys
from pathlib import Path


def row(folder: Path) -> str:
    recipe = json.loads((folder / "recipe.json").read_text())
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    accuracies = [100 * epoch["test_accuracy"] for epoch in epochs]
    best, at = max(zip(accuracies, range(1, len(epochs) + 1), strict=True))
    last_ten = accuracies[-10:]
    cells = [
        f"`{folder.name}`",
        f"`{recipe['name']}`{'' if recipe['binary'] else ' `--no-binary`'}",
        str(recipe["seed"]),
        f"{len(epochs)} of {recipe['epochs']}",
        f"**{accuracies[-1]:.2f}**",
        f"{best:.2f} ({at})",
        f"{min(last_ten):.2f} – {max(last_ten):.2f}",
        f"{max(last_ten) - min(last_ten):.2f}",
        f"{100 * epochs[-1]['train_accuracy']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not list(Path(sys.argv[1]).glob("*/metrics.jsonl")):
        sys.exit("table: expected a folder of runs, such as mnist_lenet5")
    print(
        "| run | recipe | seed | epochs | last, % | best, % (epoch) | last ten, % | "
        "their spread | training, % |\n|---|---|---|---|---|---|---|---|---|"
    )
    for metrics in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
        print(row(metrics.parent))
