"""The options of dataclasses, in groups of one's choice and order."""

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
    """A dataclass of some fields of others, for the command line.

    Args:
      title: Its name.
      about: What the help says above its options.
      fields: A dataclass and the name of its field, in the order of the help.
      choices: By field, the names that stand for something.
    """
    rows = []
    for owner, name in fields:
        hint = get_type_hints(owner, include_extras=True)[name]
        shown: dict[str, Any] = {"help": _documentation(owner)[name]}
        if names := choices.get(name):
            shown["metavar"] = f"{{{','.join(names)},MODULE:NAME}}"
        default = owner.__dataclass_fields__[name].default
        missing = default is dataclasses.MISSING
        field = dataclasses.field() if missing else dataclasses.field(default=default)
        kind: Any = Annotated[hint, tyro.conf.arg(**shown)]  # type: ignore
        rows.append((name, kind, field))
    made = dataclasses.make_dataclass(title, rows, frozen=True, kw_only=True)
    made.__doc__ = about
    return made


def fill(group: Any, values: Mapping[str, Any]) -> Any:
    """A group with those of the values that it has fields for."""
    names = [field.name for field in dataclasses.fields(group)]
    return group(**{name: values[name] for name in names if name in values})


def gather(groups: Iterable[Any], owner: Any) -> Any:
    """The dataclass whose fields are spread over some groups."""
    values = {
        field.name: getattr(one, field.name)
        for one in groups
        for field in dataclasses.fields(one)
    }
    names = [field.name for field in dataclasses.fields(owner)]
    return owner(**{name: values[name] for name in names if name in values})


@functools.cache  # Parsing a class for each of its fields took half of `--help`.
def _documentation(owner: type) -> dict[str, str]:
    """What stands below each field, in one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: " ".join(str(below.value.value).split())
        for field, below in itertools.pairwise(tree.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }
