"""A packed network's report and timings as tables for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from xnor_jax.packing.bench import Result, Spread
from xnor_jax.packing.report import Report

# The columns of `Report.table` except the kind, implied by the bits, and the weights.
_REPORT_COLUMNS = (0, 2, 4, 5, 6, 7, 8)


def report_table(title: str, report: Report) -> Table:
    """A table of the layers: bits per weight, bytes before and after, and MACs.

    Args:
      title: The table's title, such as the network's name.
      report: The packed network's report.
    """
    titles, *rows, totals = (
        [line[at] for at in _REPORT_COLUMNS] for line in report.table()
    )
    table = make_table(titles, left=("layer", "output"), title=title)
    for cells, row in zip(rows, report.rows, strict=True):
        table.add_row(*cells, style="bold" if row.kind == "binary" else None)
    table.add_section()
    table.add_row(*totals)
    return table


def bench_table(results: Sequence[Result]) -> Table:
    """A table of the timings: one row per number of threads and batch size."""
    columns = ("threads", "batch", "packed, ms", "float, ms", "images/s")
    table = make_table((*columns, "speedup"))
    for result in results:
        table.add_row(
            str(result.threads),
            str(result.batch_size),
            _milliseconds(result.packed),
            _milliseconds(result.floats),
            f"{result.batch_size / result.packed.median:,.0f}",
            _format_spread(result.ratio, 1),
        )
    return table


def make_table(
    columns: Sequence[str] = (),
    *,
    left: Sequence[str] = (),
    title: str | None = None,
    no_wrap: bool = False,
) -> Table:
    """Make an empty table in the package's style.

    Args:
      columns: The columns' titles.
      left: The columns that align left, of texts; the others align right.
      title: The table's title.
      no_wrap: Whether numbers stay on one line, so that only texts wrap.
    """
    table = Table(
        title=title,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE,
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    for column in columns:
        if column in left:
            table.add_column(column, justify="left", overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=no_wrap)
    return table


def _milliseconds(seconds: Spread) -> str:
    digits = 2 if seconds.median < 1e-2 else 1 if seconds.median < 0.1 else 0
    digits += seconds.median < 1e-4
    return _format_spread(Spread(*(1e3 * value for value in seconds)), digits)


def _format_spread(spread: Spread, digits: int) -> str:
    middle, least, most = (f"{value:.{digits}f}" for value in spread)
    return f"{middle} ({least}–{most})"
