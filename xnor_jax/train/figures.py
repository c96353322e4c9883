"""A run's figure and its TensorBoard events."""

import math
import re
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xnor_jax.masks import path_string
from xnor_jax.train import recipe as recipes
from xnor_jax.train.checkpoint import History, best_record
from xnor_jax.train.folder import DATA_WAIT, RunInfo, RunWarning
from xnor_jax.train.step import TrainState


def kernel_paths(mask: Any) -> list[str]:
    """The paths that a mask selects, in tree order."""
    return [path_string(path) for path, on in jax.tree.leaves_with_path(mask) if on]


def latent_weights(state: TrainState, mask: Any) -> dict[str, np.ndarray]:
    """The kernels that a mask selects, by path."""
    leaves = jax.tree.leaves_with_path(state.params)
    every = {path_string(path): leaf for path, leaf in leaves}
    return {path: np.asarray(every[path]) for path in kernel_paths(mask)}


class EventWriter:
    """TensorBoard events of a run.

    Args:
      folder: The run's folder.
      after: The last epoch to keep; events of later epochs are purged.
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
        """Close the file."""
        self._writer.close()


_CAPTION = """\
Loss, error: on the training images during the epoch, and on the test images after it;
the grey line marks the epoch of the lowest test error. Learning rate: that of each
epoch's last step. Sign flips: the share of a
kernel's weights whose sign a step flips, averaged over the epoch; near 0 the binary
network has settled. Latent weights: their distribution after the last epoch, in the
same colours; those near 0 flip easily, those at ±1 are clamped. Signs: a part of the
first of these kernels, blue +1, red −1.""".replace("\n", " ")

_LINES = 8  # legend entries at most
_FEW = 20  # epochs at most for a marker at each one
_CHANNELS = 16  # of a kernel that are drawn


def title(info: RunInfo) -> str:
    """The title of a run's figure: its name, network, rule, surrogate and seed."""
    fields = recipes.to_json(info.recipe)
    how = "float twin"
    if info.recipe.binary:
        how = f"rule {fields['rule']}, surrogate {fields['surrogate']}"
    return f"{info.name}: {fields['model']}, {how}, seed {fields['seed']}"


def make_figure(width: float, height: float) -> Any:
    """Make an empty figure, `width` by `height` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure to a PNG file, atomically."""
    temporary = path.with_suffix(".tmp.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(temporary, dpi=110)
    temporary.replace(path)
    # Matplotlib warns of each character.
    boxes = f"{path}: the font lacks characters of a name; boxes stand for them"
    messages = [
        RunWarning(boxes) if "missing from font" in str(each.message) else each.message
        for each in caught
    ]
    for message in {str(message): message for message in messages}.values():
        warnings.warn(message, stacklevel=2)


def plain(text: str, most: int | None = None) -> str:
    """A name as text for matplotlib: no formula, and at most so many characters."""
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}…"
    return text.replace("$", r"\$")


def markers(epochs: int) -> dict[str, Any]:
    """Options of a curve: a marker at each epoch if there are few."""
    return {"marker": "o"} if epochs <= _FEW else {}


def mark_epochs(axis: Any, epochs: int) -> None:
    """Make the x-axis one of epochs, with whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="epoch", xlim=(0.5, epochs + 0.5))
    if epochs > 8:
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5]))
    else:
        axis.set_xticks(range(1, epochs + 1))


def picture(title: str, history: History, weights: dict[str, np.ndarray]) -> Any:
    """Plot loss, error, learning rate, flip ratios, latent weights and signs.

    Args:
      title: The title of the figure.
      history: One record per epoch.
      weights: The latent kernels by path.

    Returns:
      A matplotlib figure.
    """
    figure = make_figure(13, 8)
    figure.suptitle(plain(title))
    caption = "\n".join(textwrap.wrap(_CAPTION, 200))
    figure.supxlabel(caption, fontsize="small", x=0.01, ha="left")
    axes = figure.subplots(2, 3).ravel()
    epochs = [e["epoch"] for e in history]
    look = markers(len(epochs))

    for split in ("train", "test"):
        losses = [e[f"{split}_loss"] for e in history]
        errors = [100 * (1 - e[f"{split}_accuracy"]) for e in history]
        axes[0].plot(epochs, losses, label=split, **look)
        axes[1].plot(epochs, errors, label=split, **look)
    best, last = best_record(history), history[-1]
    axes[0].set(title="loss (cross-entropy)")
    axes[1].set(
        title=f"error: last {100 - 100 * last['test_accuracy']:.2f} %, "
        f"best {100 - 100 * best['test_accuracy']:.2f} % (epoch {best['epoch']})",
        ylabel="error, %",
    )
    axes[1].axvline(best["epoch"], color="grey", linewidth=0.5)
    rates = [e["learning_rate"] for e in history]
    axes[2].plot(epochs, rates, color="black", **look)
    axes[2].set(title="learning rate")
    names = sorted(last["flip_ratios"], key=_natural)
    flips = {name: [e["flip_ratios"][name] for e in history] for name in names}
    _lines(axes[3], epochs, flips, **look)
    axes[3].set(title="sign flips per step, share of a kernel")
    for axis in axes[:4]:
        scale(axis)
        mark_epochs(axis, len(epochs))

    kernels = {name: weights[name] for name in sorted(weights, key=_natural)}
    values = [np.abs(kernel).max(initial=1e-9) for kernel in kernels.values()]
    edges = np.linspace(-max(values, default=1), max(values, default=1), 102)
    middles = (edges[1:] + edges[:-1]) / 2
    shares = {
        name: np.histogram(kernel.ravel(), edges, density=True)[0]
        for name, kernel in kernels.items()
    }
    _lines(axes[4], middles, shares, drawstyle="steps-mid")
    axes[4].set(title="latent weights", xlabel="w", ylabel="density")
    scale(axes[4])
    for axis in axes[:2]:
        axis.legend(fontsize="small")
    if flips:  # between the two panels that it describes
        axes[3].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    name, kernel = next(iter(kernels.items()), ("", np.empty(0)))
    if kernel.ndim > 1:
        draw_signs(axes[5], name, kernel)
    else:
        axes[5].set_axis_off()
    return figure


def _natural(path: str) -> list[tuple[int, str]]:
    """Sort key that puts block10 after block2."""
    words = re.split(r"(\d+)", path)
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


def _lines(axis: Any, x: Any, curves: Mapping[str, Any], **look: Any) -> None:
    """Plot labelled curves; if there are many, the last ones as one band."""
    names = list(curves)
    single = names if len(names) <= _LINES else names[: _LINES - 1]
    for name in single:
        axis.plot(x, curves[name], label=name.removesuffix("/kernel"), **look)
    if rest := names[len(single) :]:
        values = np.array([curves[name] for name in rest])
        low, high = values.min(0), values.max(0)
        grey = {"color": "grey", "alpha": 0.3}
        grey["label"] = f"{len(rest)} others,\nlowest to highest"
        if len(x) > 1:
            axis.fill_between(x, low, high, **grey)
        else:
            axis.vlines(x, low, high, linewidth=8, **grey)


def scale(axis: Any) -> None:
    """Make the y-axis logarithmic for values of a wide range, with zeros visible."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    # The ends of a vertical line are in axis coordinates, not data.
    drawn = [
        np.asarray(line.get_ydata(), float)
        for line in axis.get_lines()
        if len(line.get_xdata()) == len(set(line.get_xdata()))
    ]
    drawn += [band.get_paths()[0].vertices[:, 1] for band in axis.collections]
    numbers = np.concatenate(drawn)
    positive = numbers[numbers > 0]
    most = positive.max(initial=0)
    if most <= 5 * numbers.min():
        top = 1.1 * most or 1.0
        axis.set_ylim(-0.03 * top, top)
        return
    least = positive.min()
    if most > 1e4 * least:  # such as a learning rate that decays to 0
        least = most / 1e3
    zeros = bool((numbers < least).any())
    if zeros:
        axis.set_yscale("symlog", linthresh=least, linscale=0.5)
        axis.set_ylim(-least / 4, most * 1.3)
    else:
        axis.set_yscale("log")
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    few = most / least < 200
    ticks = [m * 10.0**d for d in decades for m in ((1, 2, 5) if few else (1,))]
    shown = [tick for tick in ticks if least / 1.1 <= tick <= most * 1.3]
    axis.yaxis.set_major_locator(FixedLocator([*([0] if zeros else []), *shown]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_signs(axis: Any, name: str, kernel: np.ndarray) -> None:
    """Draw the signs of a kernel's first channels, one tile per channel pair."""
    channels = _CHANNELS if kernel.ndim > 2 else 4 * _CHANNELS
    part = np.where(kernel[..., :channels, :channels] < 0, -1.0, 1.0)
    window = part.shape[:-2]
    height, width = (window[0], math.prod(window[1:])) if window else (1, 1)
    c_in, c_out = part.shape[-2:]
    tiles = part.reshape(height, width, c_in, c_out).transpose(3, 0, 2, 1)
    if height * width > 1:  # gaps between tiles
        tiles = np.pad(tiles, ((0, 0), (0, 1), (0, 0), (0, 1)), constant_values=0)
    picture = tiles.reshape(c_out * tiles.shape[1], c_in * tiles.shape[3])
    axis.imshow(picture, cmap="RdBu", vmin=-1.5, vmax=1.5, interpolation="nearest")
    axis.set(
        title=f"signs of {name.removesuffix('/kernel')}",
        xlabel=f"input channels, {c_in} of {kernel.shape[-2]}",
        ylabel=f"output channels, {c_out} of {kernel.shape[-1]}",
        xticks=[],
        yticks=[],
    )
