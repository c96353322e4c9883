"""What a person looks at: TensorBoard events and the report picture."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from xnor_jax.masks import path_string
from xnor_jax.train.checkpoint import History
from xnor_jax.train.folder import DATA_WAIT
from xnor_jax.train.step import TrainState


def kernel_paths(mask: Any) -> list[str]:
    """The paths that a mask selects, in the order of the tree."""
    return [path_string(path) for path, on in jax.tree.leaves_with_path(mask) if on]


def latent_weights(state: TrainState, mask: Any) -> dict[str, np.ndarray]:
    """The masked kernels, flat, by path."""
    chosen = set(kernel_paths(mask))
    leaves = jax.tree.leaves_with_path(state.params)
    return {
        path_string(path): np.asarray(leaf).ravel()
        for path, leaf in leaves
        if path_string(path) in chosen
    }


class EventWriter:
    """TensorBoard events of a run.

    Args:
      folder: The run's folder.
      after: The last epoch that stands; events behind it are taken back.
    """

    def __init__(self, folder: Path, after: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            str(folder / "tensorboard"), purge_step=after + 1 if after else None
        )

    def write(self, epoch: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
        """Write an epoch's scalars and the histograms of the latent weights."""
        number = epoch["epoch"]
        for key in ("loss", "accuracy"):
            for split in ("train", "test"):
                value = epoch[f"{split}_{key}"]
                self._writer.add_scalar(f"{key}/{split}", value, number)
        for key in ("learning_rate", "images_per_second", DATA_WAIT):
            if key in epoch:
                self._writer.add_scalar(key, epoch[key], number)
        for path, ratio in epoch["flip_ratios"].items():
            self._writer.add_scalar(f"flip_ratio/{path}", ratio, number)
        for path, values in weights.items():
            self._writer.add_histogram(f"latent/{path}", values, number, bins="auto")
        self._writer.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._writer.close()


def draw(
    path: Path, title: str, history: History, weights: dict[str, np.ndarray]
) -> None:
    """Draw the report: loss, accuracy, learning rate, flip ratios, latent weights.

    Args:
      path: Where to, a `.png`.
      title: Over the whole picture.
      history: One record an epoch.
      weights: The latent kernels, flat, by path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, 3).ravel()
    epochs = [e["epoch"] for e in history]

    for split in ("train", "test"):
        axes[0].plot(epochs, [e[f"{split}_loss"] for e in history], label=split)
        errors = [100 * (1 - e[f"{split}_accuracy"]) for e in history]
        axes[1].plot(epochs, errors, label=split)
    axes[0].set(title="loss (cross-entropy)", yscale="log")
    best = max(history, key=lambda e: (e["test_accuracy"], e["epoch"]))
    last = history[-1]
    axes[1].set(
        title=f"error: last {100 - 100 * last['test_accuracy']:.2f} %, "
        f"best {100 - 100 * best['test_accuracy']:.2f} % (epoch {best['epoch']})",
        ylabel="wrong, %",
        yscale="log",
    )
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    axes[1].axvline(best["epoch"], color="grey", linewidth=0.5)
    axes[2].plot(epochs, [e["learning_rate"] for e in history], color="black")
    axes[2].set(title="learning rate", yscale="log")
    for kernel in last["flip_ratios"]:
        ratios = [e["flip_ratios"][kernel] for e in history]
        axes[3].plot(epochs, ratios, label=kernel)
    axes[3].set(title="signs turned a step, share of a kernel")
    axes[3].set_yscale("symlog", linthresh=1e-5)
    for kernel, values in weights.items():
        axes[4].hist(values, bins=101, density=True, histtype="step", label=kernel)
    axes[4].set(title="latent weights", xlabel="w", yscale="log")
    speed = [e["images_per_second"] for e in history]
    axes[5].plot(epochs, speed, color="black")
    axes[5].set(title="training images a second", ylim=(0, None))
    for axis in axes[[0, 1, 2, 3, 5]]:
        axis.set_xlabel("epoch")
    for axis in axes[[0, 1, 3, 4]]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    temporary.replace(path)
