"""`xnor-jax …`: parses, calls, prints.

Exit status: 0 when the work is done, 2 for a wrong argument, 1 otherwise. An error is
one line on standard error. What a command needs is imported when it runs: this module
needs the standard library alone, and is there before Ctrl-C can come.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

# Where each command is, and what it does.
COMMANDS = {
    "train": ("recipes:train", "train a recipe to its end"),
    "evaluate": (
        "runs:evaluate",
        "the accuracy of a run or a packed file on its test split",
    ),
    "compare": ("runs:compare", "the accuracies and curves of runs side by side"),
    "summary": ("recipes:summary", "a recipe's layers, and which kernels are binary"),
    "pack": ("runs:pack", "write a run's network to a file, one bit a binary weight"),
    "predict": ("packed:predict", "the classes of image files, by a packed file"),
    "bench": ("packed:bench", "the speed of a packed file, beside floats"),
    "zoo": ("zoo:zoo", "the trained networks that ship with the package"),
    "push": ("zoo:push", "a packed file and its card to a hub repository"),
    "pull": ("zoo:pull", "a packed file and its card from a hub repository"),
}

# The exit status for each kind of error; what is raised has been imported.
_ERRORS = {
    ("xnor_jax.train.recipe", "RecipeError"): 2,
    ("xnor_jax.data", "DataError"): 1,
    ("xnor_jax.packing", "FormatError"): 1,
    ("xnor_jax.train.folder", "RunError"): 1,
}


class UsageError(Exception):
    """A wrong argument."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = list(sys.argv[1:] if args is None else args)
    line = "interrupted"
    if arguments[:1] == ["train"]:
        line += "; go on with --resume"
    status, before, interrupted = 0, {}, False
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: _exit_at_once(line))
        with _quiet():
            _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        status = _fail(line, 1)
    except BrokenPipeError:
        # The reader of the output has gone; so has the place to say anything.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except Exception as error:
        found = _status(error)
        if found is None:
            raise
        status = _fail(_message(error, arguments), found)
    finally:
        for number, handler in before.items():
            if handler is not None:  # one of C's, which Python leaves alone
                signal.signal(number, handler)
    if interrupted:
        # A plain exit would wait for what XLA still compiles or computes; what workers
        # shared with this process is given back before.
        gc.collect()
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def hear_interrupts() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, for what has to be cleaned up.

    Until then Ctrl-C ends the process at once: modules of other libraries swallow the
    exception while they are imported, or crash.
    """
    if callable(signal.getsignal(signal.SIGINT)):  # and is not ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _exit_at_once(line: str) -> NoReturn:
    os.write(2, f"xnor-jax: {line}\n".encode())
    os._exit(1)


def note(words: object) -> None:
    """Print a line on standard error beside the command's work."""
    say(f"note: {words}")


def say(words: object) -> None:
    """Print a line on standard error."""
    print(f"xnor-jax: {' '.join(str(words).split())}", file=sys.stderr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave it to this module to say what went wrong, while a command runs."""
    import _thread
    import io
    import logging
    import warnings

    def unraisable(what: Any) -> None:
        # Ctrl-C that came in a callback, such as JAX's at a garbage collection.
        if issubclass(what.exc_type, KeyboardInterrupt):
            _thread.interrupt_main()

    # When a file cannot be written, TensorStore's threads and tasks print a traceback
    # each through these two; the error itself is raised, and told in a line.
    asyncio, hook, out = logging.getLogger("asyncio"), sys.unraisablehook, sys.stdout
    level = asyncio.level
    errors = out.errors if isinstance(out, io.TextIOWrapper) else None
    with warnings.catch_warnings():
        try:
            sys.unraisablehook = unraisable
            asyncio.setLevel(logging.CRITICAL + 1)
            warnings.showwarning = lambda message, *_: note(message)
            warnings.simplefilter("always", UserWarning)
            if isinstance(out, io.TextIOWrapper):
                out.reconfigure(errors="replace")  # where a locale has no … or ≥
            yield
        finally:
            sys.unraisablehook = hook
            asyncio.setLevel(level)
            if isinstance(out, io.TextIOWrapper):
                out.reconfigure(errors=errors)


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        if not args:
            raise UsageError(f"no command; expected one of {', '.join(COMMANDS)}")
        return
    from xnor_jax.registry import suggestion

    if args[0] == "--version":
        print(_version())
        return
    if args[0] not in COMMANDS:
        close = suggestion(args[0], (*COMMANDS, "--help", "--version"))
        raise UsageError(
            f"unknown command {args[0]!r}; expected one of {', '.join(COMMANDS)}{close}"
        )
    _command(args[0])(args[1:])


def _command(name: str) -> Callable[[list[str]], None]:
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), function)


def _help() -> str:
    from xnor_jax.cli.output import wrapped
    from xnor_jax.train.recipe import PARTS, PRESETS

    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    parts = [f"{field}s: {', '.join(names)}" for field, names in PARTS.items()]
    rows = (
        "usage: xnor-jax COMMAND …\n",
        *lines,
        f"\nrecipes: MODULE:NAME, {', '.join(PRESETS)}",
        *parts,
        "xnor-jax COMMAND --help says more.",
    )
    return wrapped("\n".join(rows))


def _version() -> str:
    from xnor_jax import __version__, _compiled
    from xnor_jax.registry import BACKENDS

    try:
        instructions = _compiled.instruction_set()
    except RuntimeError as error:
        raise UsageError(error) from error
    others = ", ".join(name for name in BACKENDS if name != "cpu")
    if instructions is None:
        return (
            f"xnor-jax {__version__}\nbackends: {others}\n"
            "THE C++ PART IS MISSING: no backend cpu, and XLA multiplies signs, many "
            "times slower; install from source with a C++ compiler"
        )
    return f"xnor-jax {__version__}\nbackends: {others}, cpu (C++, {instructions})"


def _status(error: Exception) -> int | None:
    """The exit status for an error that is told in a line; None for a fault of ours."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, OSError) or _missing_package(error) or _out_of_memory(error):
        return 1
    for (module, name), status in _ERRORS.items():
        if module in sys.modules and isinstance(
            error, getattr(sys.modules[module], name)
        ):
            return status
    return None


def _message(error: Exception, arguments: Sequence[str]) -> object:
    package = _missing_package(error)
    if package:
        return (
            f"the package {package} is missing; install what the commands need with "
            "pip install 'xnor-jax[train]'"
        )
    if _out_of_memory(error):
        return "out of memory; fewer images at once need less"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError) and _status(error) == 2:
        return as_typed(str(error), arguments)
    return error


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """A message that names arguments in Python, with the options in their place.

    Args:
      message: Such as `"batch_size: expected …"`.
      arguments: What was typed, which decides between `--binary` and `--no-binary`.
    """
    import dataclasses
    import re

    from xnor_jax.train.recipe import Recipe

    fields = [field.name for field in dataclasses.fields(Recipe)]
    names = ["devices", "seeds", "workers", *fields]
    first = "|".join(names)
    anywhere = "|".join(name for name in names if "_" in name)

    def option(name: re.Match[str]) -> str:
        words = name[0].replace("_", "-")
        return f"--no-{words}" if f"--no-{words}" in arguments else f"--{words}"

    return re.sub(rf"^(?:{first})(?=: )|\b(?:{anywhere})\b", option, message)


def _missing_package(error: Exception) -> str | None:
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    return package if package not in ("", "xnor_jax") else None


def _out_of_memory(error: Exception) -> bool:
    # What XLA raises has no type of its own.
    exhausted = str(error).startswith("RESOURCE_EXHAUSTED")
    return exhausted or isinstance(error, MemoryError)


def _fail(error: object, status: int) -> int:
    say(error)
    return status
