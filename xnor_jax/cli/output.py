"""Console output of the commands."""

import os
import shutil
import sys
import textwrap
from typing import Any


def make_console(**options: Any) -> Any:
    """Make a console that sends control characters only to terminals.

    In a notebook, `!xnor-jax …` runs in a pseudo-terminal; `JPY_PARENT_PID` marks the
    notebook's kernel. Files and pipes get 80 columns, or those of COLUMNS. Brackets in
    names of classes and folders are not markup.
    """
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    terminal = terminal and "JPY_PARENT_PID" not in os.environ
    given = {"force_terminal": None if terminal else False, **options}
    return Console(highlight=False, markup=False, soft_wrap=True, **given)


def wrapped(text: str) -> str:
    """Wrap the long lines of a text, indenting the continuation lines of lists."""
    width = shutil.get_terminal_size().columns

    def filled(line: str) -> str:
        if len(line) <= width or line[0] in "│╭╰":  # part of a frame
            return line
        indent = "" if line.endswith(".") else "    "
        return textwrap.fill(
            line, width, subsequent_indent=indent, break_on_hyphens=False
        )

    # tyro leaves an empty row where a help text ends at the frame.
    rows = [row for row in text.rstrip().splitlines() if not row or row.strip("│ ")]
    return "\n".join(map(filled, rows))
