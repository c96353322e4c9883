"""Where the commands print."""

import os
import shutil
import sys
import textwrap
from typing import Any


def make_console(**options: Any) -> Any:
    """A console that sends control characters to terminals alone.

    A notebook's `!xnor-jax …` pretends to be a terminal; its kernel is told by
    `JPY_PARENT_PID`. Files and pipes have no width of their own.
    """
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    terminal = terminal and "JPY_PARENT_PID" not in os.environ
    width = None if terminal else 120
    given = {"force_terminal": None if terminal else False, "width": width, **options}
    return Console(highlight=False, soft_wrap=True, **given)


def wrapped(text: str) -> str:
    """A text whose long lines go on below, those of lists indented."""
    width = shutil.get_terminal_size().columns

    def filled(line: str) -> str:
        if len(line) <= width or line[0] in "│╭╰":  # of a frame
            return line
        indent = "" if line.endswith(".") else "    "
        return textwrap.fill(
            line, width, subsequent_indent=indent, break_on_hyphens=False
        )

    return "\n".join(map(filled, text.rstrip().splitlines()))
