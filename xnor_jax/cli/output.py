"""Where the commands print."""

import os
import sys
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
