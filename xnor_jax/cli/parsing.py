"""Parsing with tyro, with one-line error messages, and checks of arguments."""

import contextlib
import difflib
import functools
import inspect
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

from xnor_jax.cli import UsageError, groups
from xnor_jax.cli.output import wrapped
from xnor_jax.registry import BACKENDS, describe, expected

_KINDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path"}
_TYPES = ConstructorRegistry()


def _path(word: str) -> Path:
    if not word:  # Path("") is the current directory
        raise ValueError("expected a path, got ''")
    return Path(word)


_PARSERS = {Path: ("PATH", _path), str: ("TEXT", str), int: ("INT", int)}


@_TYPES.primitive_rule
def _one_value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A value, or None by default, which tyro's own help would show as {None}|PATH."""
    union = get_origin(info.type) in (Union, UnionType)
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    kind: Any = kinds[0] if union and len(kinds) == 1 else info.type
    if kind not in [*_PARSERS]:  # it may be unhashable
        return None
    metavar, parser = _PARSERS[kind]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parser(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


@_TYPES.primitive_rule
def _name_or_callable(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A recipe's part, given by name or as MODULE:NAME."""
    kinds = get_args(info.type)
    if str not in kinds or not any(get_origin(kind) is Callable for kind in kinds):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="NAME|MODULE:NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda part: isinstance(part, str) or callable(part),
        str_from_instance=lambda part: [
            part if isinstance(part, str) else describe(part)
        ],
    )


def command(function: Callable[..., None]) -> Callable[[list[str]], None]:
    """Make a command from a function; the function's docstring becomes the help."""

    @functools.wraps(function)
    def given(*args, **options):
        return args, options

    # Join the lines of each argument: tyro would keep some of the line breaks.
    given.__doc__ = re.sub(r"\n {8,}", " ", function.__doc__ or "")
    hint: Any = tyro.conf.arg(help_behavior_hint=groups.default_hint)  # type: ignore
    signature = inspect.signature(function)
    parameters = [
        one
        if one.default is one.empty
        else one.replace(annotation=Annotated[one.annotation, hint])
        for one in signature.parameters.values()
    ]
    given.__signature__ = signature.replace(parameters=parameters)  # type: ignore
    given.__annotations__ = {one.name: one.annotation for one in parameters}
    del given.__wrapped__

    def run(words: list[str]) -> None:
        args, options = parse(function.__name__, given, words)
        function(*args, **options)

    return run


def parse(command: str, function: Callable[..., Any], args: list[str]) -> Any:
    """Call a function with the arguments of the command line.

    Raises:
      UsageError: If they do not match the function's parameters.
    """
    complaint = io.StringIO()
    # tyro draws frames only if the output's encoding has the characters.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    shown = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace")
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(shown):
            return tyro.cli(
                function, args=args, prog=f"xnor-jax {command}", registry=_TYPES
            )
    except SystemExit as stop:
        if not stop.code:
            shown.seek(0)
            text = shown.read()  # a completion script must not be wrapped
            asked = {"-h", "--help"} & set(args)
            print(wrapped(text) if asked else text, flush=True)
            raise
        line = _line(complaint.getvalue())
        raise UsageError(f"{line} (see xnor-jax {command} --help)") from None


def _line(complaint: str) -> str:
    """Extract one line from tyro's error box; keep all words of an unknown error."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", complaint).splitlines()
    # The title is in the frame, or above a rule if the output has no frames.
    content = lines[1:-1] if lines[0].startswith("╭") else lines[2:]
    rows = [*(row[1:].rstrip("│─- ") for row in content), ""]
    words = " ".join(" ".join(rows).split())
    what = " ".join(" ".join(rows[: rows.index("")]).split())
    if found := re.search(r"Unrecognized options: ([^\s,]+)", words):
        close = difflib.get_close_matches(found[1], re.findall(r"--[\w-]+", words))
        other = [option for option in close if option not in (found[1], "--help")]
        if not found[1].startswith("-"):
            return f"unexpected argument {found[1]!r}"
        return f"unknown option {found[1]}" + "".join(
            f"; did you mean {option}?" for option in other[:1]
        )
    if what.startswith("Missing from"):
        named = [row for row in rows[: rows.index("")] if re.match(r" {5}\S", row)]
        return f"missing: {', '.join(row.split(',')[-1].strip() for row in named)}"
    if found := re.match(r"Missing value for argument '(?:\S+/)?(\S+)'", what):
        return f"{found[1]}: expected a value"
    if found := re.match(
        r"invalid choice '(.*)' for argument '(\S+)'.*?\((.*)\)", what
    ):
        choices = re.findall(r"'(.*?)'", found[3])
        return f"{found[2]}: unknown {found[1]!r}; {expected(found[1], choices)}"
    if found := re.match(r"Error parsing (?:\S+/)?(\S+): (.*)", what):
        got = re.search(r"\['.*?'\]|'.*?'", found[2])
        kind = re.search(rf"{found[1]} .*?({'|'.join(_KINDS)})\b", words[len(what) :])
        if got and kind:
            return f"{found[1]}: expected {_KINDS[kind[1]]}, got {got[0].strip('[]')}"
        return f"{found[1]}: {found[2]}"
    return what


def check_data_dir(data_dir: Path | None) -> None:
    """Check that a data set's folder exists, if one is given."""
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(
            f"--data-dir: no folder {data_dir}; expected one in the layout of the "
            "Hugging Face hub, or of class folders"
        )


def check_data(dataset: object, data_dir: Path | None) -> None:
    """Check that a folder is given or omitted, as the data set requires.

    Args:
      dataset: A data set's name, or a function that returns one.
      data_dir: The folder, if one is given.
    """
    from xnor_jax.data import SOURCES

    source = SOURCES[dataset] if isinstance(dataset, str) else None
    built_in = source is None or (source.hub is None and not source.streamed)
    if built_in and data_dir is not None:
        name = dataset if isinstance(dataset, str) else "a function"
        raise UsageError(f"--data-dir: expected none for {name}, got {data_dir}")
    if source is not None and source.hub is None and not built_in and data_dir is None:
        raise UsageError(
            "--data-dir: expected a folder of class folders, train/CLASS/* and "
            "validation/CLASS/*, or CLASS/* with --validation-share"
        )


def check_run(folder: Path, otherwise: str = "", *, option: str = "") -> None:
    """Check that a folder holds a run.

    Args:
      folder: The folder.
      option: The option that names the folder, for the start of the error.
      otherwise: What the command also accepts, for the end of the error.
    """
    if not (folder / "recipe.json").is_file():
        seeds = sorted(path.parent for path in folder.glob("seed*/recipe.json"))
        meant = f"; did you mean {seeds[0]}?" if seeds else ""
        raise UsageError(
            f"{option and f'--{option}: '}no run in {folder}; expected a folder that "
            f"train wrote{otherwise}{meant}"
        )


def check_file(path: Path) -> None:
    """Check that a file exists."""
    if not path.is_file():
        raise UsageError(f"no file {path}")


def find_packed(file: Path) -> Path:
    """Find a packed file or a network in the zoo; an existing file takes precedence."""
    from xnor_jax import zoo

    try:
        path = zoo.find(file)
    except ValueError as error:
        raise UsageError(error) from None
    if (path / "recipe.json").is_file():
        raise UsageError(
            f"no file {path}, which is a run's folder; write its packed file with "
            "xnor-jax pack"
        )
    check_file(path)
    return path


def check_output(output: Path) -> None:
    """Check that `output` is a possible file in an existing folder."""
    if (output.exists() and not output.is_file()) or not output.parent.is_dir():
        raise UsageError(
            f"--output: expected a regular file in a folder that exists, got {output}"
        )


def check_backend(backend: str = "auto") -> None:
    """Check that a backend exists and is available."""
    if backend not in (names := ("auto", *BACKENDS)):
        raise UsageError(f"--backend: unknown {backend!r}; {expected(backend, names)}")
    from xnor_jax.ops import backends

    try:
        backends.resolve("--backend", backend)
    except RuntimeError as error:
        raise UsageError(str(error)) from error
