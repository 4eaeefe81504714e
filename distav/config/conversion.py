"""Conversion of plain values, as YAML and the command line give them, to the settings of a configuration, and back."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, NoReturn, cast, get_args, get_origin

from distav.config.bounds import Bound
from distav.config.errors import SettingError, did_you_mean
from distav.config.phases import PHASE_KINDS
from distav.config.schema import Config
from distav.config.setting_tree import SettingTree
from distav.config.setting_types import FilePath, choices, describe, is_nullable, setting_types, union_members

_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}


class Converter:
    """Converts the plain values of a configuration to its dataclasses.

    Attributes:
        tree: the settings of the configuration.
        text_of: returns the text that a file has for a setting by its key, or None. A text setting takes it where YAML
            reads a number, as in `name: 1.10`.
    """

    def __init__(self, tree: SettingTree, text_of: Callable[[str], str | None]):
        self.tree, self.text_of = tree, text_of

    def config(self, values: Mapping[str, Any]) -> Config:
        """Return the configuration.

        Raises:
            SettingError: for an unknown key, or a value of the wrong type.
        """
        phases = {
            str(name): self._section(PHASE_KINDS[phase["kind"]], phase, f"phases.{name}")
            for name, phase in values["phases"].items()
        }
        sections = {name: value for name, value in values.items() if name != "phases"}
        return dataclasses.replace(self._section(Config, sections, ""), phases=phases)

    def _section(self, section: type, values: object, key: str) -> Any:
        if not isinstance(values, Mapping):
            raise SettingError(
                key,
                f"{key}={_format(values)}: allowed: a mapping of the settings of this section, e.g. {{name: value}}; "
                "remove the key if there are none.",
            )
        types = setting_types(section)
        bounds = {setting.name: setting.metadata.get("bound") for setting in dataclasses.fields(section)}
        converted: dict[str, Any] = {}
        for name, value in cast(Mapping[Any, Any], values).items():
            setting = f"{key}.{name}" if key else str(name)
            if name not in types:
                raise self._unknown(setting, str(name))
            converted[name] = self._convert(value, types[name], setting, bounds[name])
        return section(**converted)

    def _unknown(self, key: str, name: str) -> SettingError:
        if "." in name and self.tree.type_of(key) is not None:
            section, _, last = key.rpartition(".")
            return SettingError(
                key, f"'{name}' is one name; write {last} below {section} (YAML: {section}: {{{last}: ...}})."
            )
        return self.tree.unknown(key)

    def _convert(self, value: Any, annotation: Any, key: str, bound: Bound | None = None) -> Any:
        if value is None and is_nullable(annotation):
            return None
        if annotation is str or annotation == FilePath:
            text = self._text(value, annotation, key)
            return os.path.expanduser(text) if annotation == FilePath else text
        if annotation in (int, float, bool):
            return _scalar(value, annotation, key, bound)
        if names := choices(annotation):
            return self._choice(value, annotation, key, names)
        if dataclasses.is_dataclass(annotation):
            return self._section(cast(type, annotation), value, key)
        if members := union_members(annotation):
            return self._any_of(value, members, annotation, key, bound)
        arguments = get_args(annotation)
        if get_origin(annotation) is list and arguments:
            if not isinstance(value, list | tuple):
                _reject(key, value, annotation)
            return [self._convert(element, arguments[0], key, bound) for element in cast(list[Any], value)]
        if get_origin(annotation) is dict and arguments:
            if not isinstance(value, Mapping):
                _reject(key, value, annotation)
            entries = cast(Mapping[Any, Any], value).items()
            return {str(name): self._convert(entry, arguments[1], f"{key}.{name}") for name, entry in entries}
        return value

    def _any_of(self, value: Any, members: tuple[Any, ...], annotation: Any, key: str, bound: Bound | None) -> Any:
        for member in members:
            try:
                return self._convert(value, member, key)
            except SettingError:
                continue
        _reject(key, value, annotation, bound)

    def _text(self, value: object, annotation: Any, key: str) -> str:
        if isinstance(value, str):
            return value
        if value is None:
            raise SettingError(key, null_message(key))
        if isinstance(value, bool | int | float):
            text = self.text_of(key)
            if text is None:
                kind = "true or false" if isinstance(value, bool) else "a number"
                raise SettingError(
                    key,
                    f"{key}={_format(value)}: {kind} was given where a text is needed, and its spelling is not known. "
                    f'Quote it: {key.rpartition(".")[2]}: "TEXT".',
                )
            return text
        _reject(key, value, annotation)

    def _choice(self, value: object, annotation: Any, key: str, names: list[str]) -> Any:
        text = value.name if isinstance(value, Enum) else value
        if not isinstance(text, str):
            text = self.text_of(key) or _format(text)
        if text not in names:
            raise SettingError(key, f"{key}={text}: allowed: {', '.join(names)}.{did_you_mean(text, names)}")
        if get_origin(annotation) is Literal:
            return get_args(annotation)[names.index(text)]
        return annotation[text]


def null_message(key: str) -> str:
    """Return the error message for null as the value of a text setting."""
    return (
        f"{key}=null: allowed: a text; null is none. Where the setting may be empty, write {key}= on the command line, "
        f'or {key.rpartition(".")[2]}: "" in a file.'
    )


def to_plain(value: Any) -> Any:
    """Return dataclasses and enums as the plain values that YAML stores; `${` in texts is escaped."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {setting.name: to_plain(getattr(value, setting.name)) for setting in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(entry) for key, entry in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [to_plain(element) for element in cast(list[Any], value)]
    if isinstance(value, Enum):
        return value.name
    return escape(value) if isinstance(value, str) else value


def escape(text: str) -> str:
    """Return a text that OmegaConf reads literally, without interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _scalar(value: Any, annotation: Any, key: str, bound: Bound | None) -> Any:
    """Return a number or boolean."""
    if annotation is bool:
        boolean = _BOOLEANS.get(str(value).lower())
        if boolean is None:
            _reject(key, value, annotation)
        return boolean
    allowed = (int, str) if annotation is int else (int, float, str)
    if isinstance(value, allowed) and not isinstance(value, bool):
        try:
            return annotation(value)
        except (ValueError, OverflowError):
            pass
    _reject(key, value, annotation, bound)


def _reject(key: str, value: object, annotation: Any, bound: Bound | None = None) -> NoReturn:
    allowed = describe(annotation)
    if bound:
        complete = bound.allowed.startswith(allowed) or bool(union_members(annotation))
        allowed = bound.allowed if complete else f"{allowed}, {bound.allowed}"
    raise SettingError(key, f"{key}={_format(value)}: allowed: {allowed}.")


def _format(value: object) -> str:
    """Return a value as YAML and the command line write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
