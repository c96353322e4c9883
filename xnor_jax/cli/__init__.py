"""The command line, `xnor-jax …`.

The exit status is 0 on success, 2 for a wrong argument and 1 otherwise. An error is one
line on standard error. A command's dependencies are imported when it runs: this module
needs only the standard library, so that it can handle Ctrl-C from the start.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

# The function and the description of each command.
COMMANDS = {
    "train": ("recipes:train", "train a recipe to its end"),
    "evaluate": (
        "runs:evaluate",
        "the accuracy of a run or a packed file on its test split",
    ),
    "compare": ("runs:compare", "the accuracies and curves of runs side by side"),
    "summary": ("recipes:summary", "a recipe's layers, and which kernels are binary"),
    "pack": ("runs:pack", "write a run's network to a file, one bit per binary weight"),
    "predict": ("packed:predict", "the classes of image files, by a packed file"),
    "bench": ("packed:bench", "the speed of a packed file, against float32"),
    "zoo": ("zoo:zoo", "the trained networks that ship with the package"),
    "push": ("zoo:push", "a packed file and its card to a hub repository"),
    "pull": ("zoo:pull", "a packed file and its card from a hub repository"),
}

# The exit status of each error type, by name: a raised type is already imported.
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
        line += "; continue with --resume"
    status, before, interrupted = 0, {}, False
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
        if before[signal.SIGINT] is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: _exit_at_once(line))
        # Figures are written to files; a notebook names a backend of its own kernel.
        os.environ["MPLBACKEND"] = "agg"
        with _quiet():
            _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
        status = _fail(line, 1)
    except BrokenPipeError:
        # The reader has closed the output; the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except Exception as error:
        found = _status(error)
        if found is None:
            raise
        status = _fail(_message(error, arguments), found)
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: a C handler, which Python cannot restore
                signal.signal(number, handler)
    if interrupted:
        # A normal exit would wait for XLA to finish compiling or computing. Garbage
        # collection first releases the resources shared with worker processes.
        gc.collect()
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def enable_interrupts() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt, so that cleanup code runs.

    Before this call, Ctrl-C ends the process at once: some libraries swallow the
    exception during their import, or crash.
    """
    if callable(signal.getsignal(signal.SIGINT)):  # SIGINT is not ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _exit_at_once(line: str) -> NoReturn:
    os.write(2, f"xnor-jax: {line}\n".encode())
    os._exit(1)


def note(words: object) -> None:
    """Print a note on standard error."""
    say(f"note: {words}")


def say(words: object) -> None:
    """Print a line on standard error."""
    print(f"xnor-jax: {' '.join(str(words).split())}", file=sys.stderr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Print warnings as notes, and keep other libraries from printing tracebacks."""
    import _thread
    import io
    import logging
    import warnings

    def unraisable(what: Any) -> None:
        # Ctrl-C during a callback, such as JAX's at a garbage collection.
        if issubclass(what.exc_type, KeyboardInterrupt):
            _thread.interrupt_main()

    # If a file cannot be written, TensorStore's threads and tasks print tracebacks
    # through these two; the error itself is raised, and `main` prints it.
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
                out.reconfigure(errors="replace")  # if the locale lacks … or ≥
            yield
        finally:
            # A failed save leaves its own hook, for Orbax's threads.
            if sys.unraisablehook is unraisable:
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
        "Run xnor-jax COMMAND --help for more.",
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
            "THE C++ PART IS MISSING: there is no backend cpu, and products of signs "
            "run many times slower in XLA; install from source with a C++ compiler"
        )
    return f"xnor-jax {__version__}\nbackends: {others}, cpu (C++, {instructions})"


def _status(error: Exception) -> int | None:
    """The exit status for an error that is printed as one line; None for a bug."""
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
        return "out of memory; use a smaller batch"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError) and _status(error) == 2:
        return as_typed(str(error), arguments)
    return error


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """Replace the Python argument names in a message with command-line options.

    Args:
      message: A message such as `"batch_size: expected …"`.
      arguments: The command line, which selects `--binary` or `--no-binary`.
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

    # A name in quotes or parentheses is an argument of a user's function.
    return re.sub(rf"^(?:{first})(?=: )|(?<!['(])\b(?:{anywhere})\b", option, message)


def _missing_package(error: Exception) -> str | None:
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    return package if package not in ("", "xnor_jax") else None


def _out_of_memory(error: Exception) -> bool:
    # XLA's exception has no type of its own.
    exhausted = str(error).startswith("RESOURCE_EXHAUSTED")
    return exhausted or isinstance(error, MemoryError)


def _fail(error: object, status: int) -> int:
    say(error)
    return status
