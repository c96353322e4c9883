"""Groups of command-line options, made from the fields of dataclasses."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_type_hints

import tyro


def group(
    title: str,
    about: str,
    fields: Iterable[tuple[Any, str]],
    choices: Mapping[str, Iterable[str]],
) -> type:
    """Make a dataclass from fields of other dataclasses, as a group of options.

    Args:
      title: The name of the new dataclass.
      about: The help text above the options.
      fields: Pairs of a dataclass and the name of one of its fields, in help order.
      choices: The registered names that a field accepts, by field.
    """
    rows = []
    for cls, name in fields:
        hint = get_type_hints(cls, include_extras=True)[name]
        shown: dict[str, Any] = {
            "help": _documentation(cls)[name],
            "help_behavior_hint": default_hint,
        }
        if names := choices.get(name):
            shown["metavar"] = f"{{{','.join(names)},MODULE:NAME}}"
        default = cls.__dataclass_fields__[name].default
        missing = default is dataclasses.MISSING
        field = dataclasses.field() if missing else dataclasses.field(default=default)
        kind: Any = Annotated[hint, tyro.conf.arg(**shown)]  # type: ignore
        rows.append((name, kind, field))
    options = dataclasses.make_dataclass(title, rows, frozen=True, kw_only=True)
    options.__doc__ = about
    return options


def fill(cls: Any, values: Mapping[str, Any]) -> Any:
    """Instantiate a dataclass from the values that it has fields for."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: values[name] for name in names if name in values})


def gather(instances: Iterable[Any], cls: Any) -> Any:
    """Instantiate a dataclass whose fields are spread over several groups."""
    values = {
        field.name: getattr(options, field.name)
        for options in instances
        for field in dataclasses.fields(options)
    }
    return fill(cls, values)


def default_hint(shown: str) -> str:
    """The end of an option's help: its default, given as text, if it has one."""
    return "" if shown in ("", "None") else f"(default: {shown})"


@functools.cache  # Parsing a class once per field takes half of `--help`'s time.
def _documentation(cls: type) -> dict[str, str]:
    """The docstring below each field, as one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
