"""Types of settings beyond those of Python, and how the types read in messages."""

import dataclasses
import functools
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

FilePath = Annotated[str, "path"]
"""A path or URL; `~` at its start is replaced by the home directory when a configuration is loaded."""


@functools.cache
def setting_types(section: type) -> dict[str, Any]:
    """Return the types of the settings of a section by name."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {setting.name: hints[setting.name] for setting in dataclasses.fields(section)}


def is_path(annotation: Any) -> bool:
    """Return whether a setting of this type is a path."""
    return annotation == FilePath or any(is_path(option) for option in union_members(annotation))


def is_text(annotation: Any) -> bool:
    """Return whether a setting of this type takes any text, such as a path or a name."""
    members = union_members(annotation) or (annotation,)
    return any(member is str or member == FilePath for member in members)


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union except None, such as (int,) of `int | None`; empty for any other type."""
    if get_origin(annotation) not in (types.UnionType, Union):
        return ()
    return tuple(member for member in get_args(annotation) if member is not type(None))


def is_nullable(annotation: Any) -> bool:
    """Return whether null is allowed for a setting of this type."""
    return annotation in (Any, object, None) or type(None) in get_args(annotation)


def choices(annotation: Any) -> list[str]:
    """Return the values of an enum or a literal type; empty for any other type."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [member.name for member in annotation]
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def describe(annotation: Any) -> str:
    """Return the values that a type allows in words, for error messages."""
    if members := union_members(annotation):
        return " or ".join([*map(describe, members), *(["null"] if is_nullable(annotation) else [])])
    if names := choices(annotation):
        return ", ".join(names)
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        FilePath: "a path",
    }
    if annotation in words:
        return words[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is list and arguments:
        example = {int: "[10, 20]", float: "[0.1, 0.5]"}.get(arguments[0], "[A, B]")
        return f"a list, each element {describe(arguments[0])}, e.g. {example}"
    if get_origin(annotation) is dict or dataclasses.is_dataclass(annotation):
        return "a mapping, {name: value}"
    return "any value" if annotation in (Any, object) else str(annotation)
