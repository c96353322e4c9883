"""Control characters are written only to terminals; lines fit 80 columns."""

import io

import numpy as np
import pytest
from commands import run_ok

from xnor_jax.cli import output
from xnor_jax.train import confusion


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("out", "environment", "terminal"),
    [
        (Terminal, {"TERM": "xterm"}, True),
        (Terminal, {"TERM": "xterm", "JPY_PARENT_PID": "7"}, False),
        (io.StringIO, {"TERM": "xterm"}, False),
        (io.StringIO, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
        (io.StringIO, {"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False),
    ],
)
def test_notebooks_files_and_pipes_are_not_terminals(
    out, environment, terminal, monkeypatch
):
    for name in ("JPY_PARENT_PID", "FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout", out())
    console = output.make_console()
    assert console.is_terminal == terminal
    console.print("words", style="bold")
    assert ("\x1b" in console.file.getvalue()) == terminal


def test_brackets_in_names_are_printed(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    console = output.make_console()
    counts = np.array([[1, 0], [0, 2]])
    console.print("in runs/[bold]x")
    console.print(confusion.table(counts, ["dog [old]", "[bold]cat"]))
    text = console.file.getvalue()
    assert "runs/[bold]x" in text and "dog [old]" in text
    assert text.count("[bold]cat") == 2  # the head and the row


@pytest.mark.parametrize(
    "args",
    [
        ("zoo",),
        pytest.param(("summary", "imagenet-reactneta"), marks=pytest.mark.slow),
        ("summary", "cifar10-nin"),
    ],
)
def test_piped_lines_have_80_columns(args, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = run_ok(capsys, *args).splitlines()
    assert 60 < max(len(line.rstrip()) for line in lines) <= 80
