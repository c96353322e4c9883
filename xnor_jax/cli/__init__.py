"""`xnor-jax …`: parses, calls, prints.

Exit status: 0 when the work is done, 2 for a wrong argument, 1 otherwise. An error is
one line on standard error. What a command needs is imported when it runs.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from xnor_jax import __version__
from xnor_jax.registry import expected

# Where each command is, and what it does.
COMMANDS = {
    "train": ("recipes:train", "train a recipe to its end"),
    "evaluate": (
        "runs:evaluate",
        "the accuracy of a run or a packed file on its test split",
    ),
    "summary": ("recipes:summary", "a recipe's layers, and which kernels are binary"),
    "pack": ("runs:pack", "write a run's network to a file, one bit a binary weight"),
    "predict": ("packed:predict", "the classes of image files, by a packed file"),
    "bench": ("packed:bench", "the speed of a packed file, beside floats"),
}


class UsageError(Exception):
    """A wrong argument."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if args is None else args)
    # When a file cannot be written, TensorStore's threads and tasks print a traceback
    # each through these two; the error itself is raised, and told below in a line.
    sys.unraisablehook = lambda *_: None
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    warnings.showwarning = lambda message, *_: note(message)
    status = 0
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        mend = "; go on with --resume" if arguments[:1] == ["train"] else ""
        status = _fail(f"interrupted{mend}", 1)
    except BrokenPipeError:
        # The reader of the output has gone; so has the place to say anything.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        found = _status(error)
        if found is None:
            raise
        status = _fail(_message(error), found)
    sys.exit(status)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        if not args:
            raise UsageError(f"no command; expected one of {', '.join(COMMANDS)}")
        return
    if args[0] == "--version":
        print(f"xnor-jax {__version__}")
        return
    if args[0] not in COMMANDS:
        raise UsageError(f"unknown command {args[0]!r}; {expected(args[0], COMMANDS)}")
    _command(args[0])(args[1:])


def _command(name: str) -> Callable[[list[str]], None]:
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def _help() -> str:
    from xnor_jax.train.recipe import PRESETS

    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: xnor-jax COMMAND …\n",
            *lines,
            f"\nrecipes: {', '.join(PRESETS)}",
            "xnor-jax COMMAND --help says more.",
        )
    )


def _status(error: Exception) -> int | None:
    """The exit status for an error that is told in a line; None for a fault of ours."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, OSError) or _missing_package(error):
        return 1
    from xnor_jax.train.recipe import RecipeError

    if isinstance(error, RecipeError):
        return 2
    from xnor_jax.data import DataError
    from xnor_jax.deploy import FormatError
    from xnor_jax.train.folder import RunError

    return 1 if isinstance(error, DataError | FormatError | RunError) else None


def _message(error: Exception) -> object:
    package = _missing_package(error)
    if package:
        return (
            f"the package {package} is missing; install what the commands need with "
            "pip install 'xnor-jax[train]'"
        )
    return error


def _missing_package(error: Exception) -> str | None:
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    return package if package not in ("", "xnor_jax") else None


def note(words: object) -> None:
    """Say something in a line on standard error that does not end the command."""
    _say(f"note: {words}")


def _fail(error: object, status: int) -> int:
    _say(error)
    return status


def _say(words: object) -> None:
    print(f"xnor-jax: {' '.join(str(words).split())}", file=sys.stderr)
