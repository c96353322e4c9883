"""Parsing with tyro, whose complaints become one line, and checks of arguments."""

import contextlib
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from xnor_jax.cli import UsageError


def command(function: Callable[..., None]) -> Callable[[list[str]], None]:
    """A command with the arguments of a function, whose docstring is its help."""

    @functools.wraps(function)
    def given(*args, **options):
        return args, options

    def run(words: list[str]) -> None:
        args, options = parse(function.__name__, given, words)
        function(*args, **options)

    return run


def parse(command: str, function: Callable[..., Any], args: list[str]) -> Any:
    """Call a function with the arguments of the command line.

    Raises:
      UsageError: If they are not the function's.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(function, args=args, prog=f"xnor-jax {command}")
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"\x1b\[[0-9;]*m", "", complaint.getvalue())
        words = re.sub(r"╭.*?╮|[│╰╯─]+", " ", words)
        words = re.sub(r"For full helptext.*", "", " ".join(words.split()))
        raise UsageError(f"{words.strip()} (see xnor-jax {command} --help)") from None


def check_data_dir(data_dir: Path | None) -> None:
    """See that a data set's folder is there, if one is given."""
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(
            f"--data-dir: no folder {data_dir}; expected one in the layout of the "
            "Hugging Face hub"
        )


def check_run(folder: Path, more: str) -> None:
    """See that a run's folder is there."""
    if not folder.exists():
        raise UsageError(f"no run in {folder} {more}")


def check_file(path: Path) -> None:
    """See that a file is there."""
    if not path.is_file():
        raise UsageError(f"no file {path}")


def check_backend(backend: str = "auto") -> None:
    """See that a backend is there and can run here."""
    from xnor_jax.ops import backends

    try:
        backends.resolve("xnor-jax", backend)
    except RuntimeError as error:
        raise UsageError(str(error).removeprefix("xnor-jax: ")) from error
