"""The progress of a run: a bar in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from xnor_jax.train.folder import DATA_WAIT
from xnor_jax.train.step import Metrics

# Waiting for data is reported from this share of an epoch, and as many seconds.
_MUCH, _LONG = 0.05, 1.0


class Display:
    """A bar for the current epoch and one line for each completed epoch.

    Args:
      console: The console to print to; only the lines if it is not a terminal.
      epochs: The number of epochs of the run.
      done: The number of completed epochs.
      images_per_epoch: Images per epoch, for the bar and the rates.
      batch_size: Images per step.
    """

    def __init__(
        self,
        console: Console,
        *,
        epochs: int,
        done: int,
        images_per_epoch: int,
        batch_size: int,
    ):
        self._console = console
        self._epochs = epochs
        self._epoch = done
        self._first = done
        self._images = images_per_epoch
        self._batch = batch_size
        self._begin = self._epoch_begin = time.perf_counter()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._task = self._progress.add_task(
            "epoch", total=images_per_epoch, epoch=f"{done + 1}/{epochs}", status=""
        )

    def __enter__(self) -> "Display":
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        self._progress.stop()

    def begin_epoch(self, epoch: int) -> None:
        """Start the bar of an epoch."""
        self._epoch, self._epoch_begin = epoch, time.perf_counter()
        label = f"{epoch}/{self._epochs}"
        status = "compiling" if epoch == self._first + 1 else ""
        self._progress.update(self._task, completed=0, epoch=label, status=status)

    def on_steps(self, steps: int, means: Metrics) -> None:
        """Update the bar after the first `steps` steps of the epoch."""
        images = steps * self._batch
        now = time.perf_counter()
        rate = images / max(now - self._epoch_begin, 1e-9)
        before = (self._epoch - 1 - self._first) * self._images
        average = (before + images) / max(now - self._begin, 1e-9)
        ahead = (self._epochs - self._epoch + 1) * self._images - images
        self._progress.update(
            self._task,
            completed=images,
            status=f"loss {float(means.loss):.4f}  "
            f"accuracy {float(means.accuracy):7.2%}  "
            f"{rate:,.0f} images/s  {_clock(ahead / average)} left",
        )

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Print the line of a completed epoch."""
        line = (
            f"epoch {record['epoch']:>3}/{self._epochs}  "
            f"train {record['train_loss']:.4f} {record['train_accuracy']:7.2%}  "
            f"test {record['test_loss']:.4f} {record['test_accuracy']:7.2%}  "
            f"flips {record['flip_ratio']:.0e}  {record['images_per_second']:,.0f}/s"
        )
        seconds = self._images / record["images_per_second"]
        share = record.get(DATA_WAIT, 0)
        if share >= _MUCH and share * seconds >= _LONG:
            line += f"\n  {share:.1%} of the time waiting for data"
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
