"""Custom parts of a recipe: MODULE:NAME references, callables, source digests."""

import contextlib
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xnor_jax._words import described, first_line
from xnor_jax.registry import describe


class RecipeError(ValueError):
    """A recipe that cannot be trained.

    Args:
      message: The error, and what was expected.
      field: The field at fault, which precedes the message.
    """

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message if field is None else f"{field}: {message}")


def is_reference(text: str) -> bool:
    """Whether a name has the form MODULE:NAME."""
    return ":" in text


def find(reference: str) -> Any:
    """Import the object at MODULE:NAME; the current directory is searched first.

    Args:
      reference: Such as `"my_net:RECIPE"`; both parts may contain dots.

    Raises:
      RecipeError: If the module cannot be imported, or has no such name.
    """
    name, _, path = reference.partition(":")
    if name.endswith(".py"):
        file = os.path.normpath(name.removesuffix(".py"))
        folder, module = os.path.split(file)
        if folder.startswith((os.sep, os.pardir)):
            where = f", from the folder {folder}"
        else:
            where, module = "", file.replace(os.sep, ".")
        raise RecipeError(
            f"{reference}: expected MODULE:NAME, such as {module}:{path}{where}"
        )
    if not all(word.isidentifier() for word in re.split("[.:]", reference)):
        # From `describe`, of a lambda, a nested function, a partial or an instance.
        nameless = "<" in path or path.endswith(")")
        raise RecipeError(
            f"{reference}: expected MODULE:NAME of an importable object, such as "
            "my_net:RECIPE"
            + ("; or pass the recipe to xnor_jax.train.load" if nameless else "")
        )
    module = _import(name, reference)
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError as error:
        if name == "__main__":
            raise RecipeError(
                f"{reference} is defined in a script or session, so it cannot be "
                "imported; define it in a module, or pass the recipe to "
                "xnor_jax.train.load"
            ) from error
        raise RecipeError(
            f"{reference}: module {name} has no attribute {path}"
        ) from error


def digests(references: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each module's source file, by the module's name.

    Args:
      references: `"module:…"`; modules that are not loaded or have no file are omitted.
    """
    found = {}
    for reference in references:
        name = reference.partition(":")[0]
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).is_file():
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def arguments(
    field: str, function: Callable[..., Any], offered: Mapping[str, Any]
) -> dict[str, Any]:
    """Select the offered keyword arguments that a callable's signature takes.

    Raises:
      RecipeError: If it requires an argument that is not offered.
    """
    signature = _signature(function)
    if signature is None:
        return dict(offered)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        taken = dict(offered)
    else:
        by_name = (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        )
        taken = {
            name: offered[name]
            for name, parameter in signature.parameters.items()
            if parameter.kind in by_name and name in offered
        }
    try:
        signature.bind(**taken)
    except TypeError as error:
        raise RecipeError(
            f"{describe(function)}: {error}; it is called with the keyword arguments "
            f"among {', '.join(map(repr, offered))} that it takes",
            field=field,
        ) from error
    return taken


def check_signature(field: str, function: Callable[..., Any], *names: str) -> None:
    """Check that a callable takes these positional arguments.

    Raises:
      RecipeError: If it does not.
    """
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        raise RecipeError(
            f"expected a function of ({', '.join(names)}), got {describe(function)}: "
            f"{error}",
            field=field,
        ) from error


@contextlib.contextmanager
def errors(field: str, part: Any, more: str = "") -> Iterator[None]:
    """Convert an exception of a recipe's part into a one-line RecipeError.

    Args:
      field: The part's field.
      part: A registered name, for which only ValueError and TypeError are converted, or
        a custom callable, for which every exception is.
      more: The input of the part, for the message.

    Raises:
      RecipeError: If the part raises such an exception.
    """
    try:
        yield
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:
        if not callable(part) and not isinstance(error, ValueError | TypeError):
            raise
        name = describe(part) if callable(part) else part
        said = reason(error) if callable(part) else first_line(error)
        where = f" {more}" if more else ""
        raise RecipeError(f"{name} fails{where}: {said}", field=field) from error


def reason(error: BaseException) -> str:
    """Describe an error in one line, with its last position in the user's files."""
    said = described(error)
    if isinstance(error, SyntaxError):
        return f"{said} in {error.filename}" if "line" in said else said
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_users(frame.filename)
    ]
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return said + where


def _import(name: str, reference: str) -> Any:
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RecipeError(f"cannot import {name}: {reason(error)}") from error
        raise RecipeError(
            f"{reference}: there is no module {error.name} in the current directory or "
            "among the installed packages; run from the folder that contains "
            f"{name.partition('.')[0]}.py"
        ) from error
    except (Exception, SystemExit) as error:  # a module may raise anything
        raise RecipeError(f"cannot import {name}: {reason(error)}") from error


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature; None if there is none, as for some built-ins."""
    # A metaclass, such as that of nnx.Module, hides a class's own parameters.
    called: Any = function
    if isinstance(function, type):
        init: Any = function.__init__
        called = functools.partial(init, None)
    try:
        return inspect.signature(called)
    except (TypeError, ValueError):
        return None


def _is_users(file: str) -> bool:
    library = Path(__file__).parents[1]
    path = Path(file)
    return (
        path.is_file()
        and library not in path.parents
        and "site-packages" not in path.parts
        and Path(os.__file__).parent not in path.parents
    )
