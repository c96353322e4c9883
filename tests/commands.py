"""The command line called in this process: its status and what it said."""

import pytest

from xnor_jax import cli


def said(capsys, *args):
    """The exit status, the output and the errors."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, args)))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def finished(capsys, *args):
    """The output of a command that succeeds."""
    code, out, err = said(capsys, *args)
    assert (code, err) == (0, "")
    return out


def refused(capsys, *args):
    """The exit status and the line of a command that does not."""
    code, out, err = said(capsys, *args)
    assert not out or args[0] == "train"  # which may have begun
    assert err.startswith("xnor-jax: ") and len(err.splitlines()) == 1
    return code, err
