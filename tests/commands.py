"""Run commands in this process and capture their exit status and output."""

import pytest

from xnor_jax import cli


def run_cli(capsys, *args):
    """Run a command; return its exit status, output and errors."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, args)))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def run_ok(capsys, *args):
    """Run a command that succeeds; return its output."""
    code, out, err = run_cli(capsys, *args)
    assert (code, err) == (0, "")
    return out


def run_failing(capsys, *args):
    """Run a command that fails; return its exit status and its one-line error."""
    code, out, err = run_cli(capsys, *args)
    assert not out or args[0] == "train"  # training may have begun
    assert err.startswith("xnor-jax: ") and len(err.splitlines()) == 1
    return code, err
