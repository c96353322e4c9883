"""Control characters are written only to terminals; lines fit 80 columns."""

import io

import pytest
from commands import run_ok

from xnor_jax.cli import output


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
    console.print("[bold]words[/]")
    assert ("\x1b" in console.file.getvalue()) == terminal


@pytest.mark.parametrize(
    "args", [("zoo",), ("summary", "imagenet-reactneta"), ("summary", "cifar10-nin")]
)
def test_piped_lines_have_80_columns(args, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = run_ok(capsys, *args).splitlines()
    assert 60 < max(len(line.rstrip()) for line in lines) <= 80
