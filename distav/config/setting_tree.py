"""The settings of a configuration by dotted key, with their types, and suggestions for unknown keys."""

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from distav.config.errors import SettingError, closest, format_list, similarity
from distav.config.schema import Config
from distav.config.setting_types import setting_types, union_members

_PHASES = setting_types(Config)["phases"]
_MAX_NAMES = 12


class SettingTree:
    """All settings of a configuration.

    Attributes:
        phases: config dataclass of each phase by name.
    """

    def __init__(self, phases: dict[str, type]):
        self.phases = phases

    def type_of(self, key: str) -> Any:
        """Return the type of a setting or section; None if there is none with this key."""
        node: Any = Config
        for name in key.split("."):
            node = self._child(node, name)
            if node is None:
                return None
        return node

    def is_entry(self, key: str) -> bool:
        """Return whether a key is an entry of a setting with free names, such as `deepspeed.extra`."""
        parent = self.type_of(key.rpartition(".")[0])
        return parent is Any or get_origin(parent) is dict and parent != _PHASES

    def free_settings(self) -> list[str]:
        """Return the keys of the settings whose entries have free names."""
        return [key for key in self.keys() if get_origin(self.type_of(key)) is dict and key != "phases"]

    def keys(self) -> Iterator[str]:
        """Return the keys of all sections and settings."""
        yield from self._keys_below("", Config)

    def unknown(self, key: str) -> SettingError:
        """Return the error for a key that does not exist; it suggests the closest keys."""
        names = key.split(".")
        depth = next(depth for depth in range(len(names)) if self.type_of(".".join(names[: depth + 1])) is None)
        parent, name = ".".join(names[:depth]), names[depth]
        suggestion = self._suggestion(key)
        siblings = self._child_names(self.type_of(parent) if parent else Config)
        if parent == "phases":
            text = f"there is no phase '{name}'.{suggestion} Phases: {format_list(siblings)}; the file can add others."
        elif not siblings:
            text = f"there is no setting '{key}': {parent} is a single value.{suggestion}"
        else:
            siblings.sort(key=lambda sibling: -similarity(name, sibling))
            text = (
                f"there is no setting '{key}'.{suggestion} {'Settings of ' + parent if parent else 'Sections'}: "
                f"{format_list(siblings, _MAX_NAMES)}. {self._described_in(parent)} describes all of them."
            )
        return SettingError(key, text)

    def _suggestion(self, key: str) -> str:
        """Return " Did you mean ...?" with the closest keys, or an empty string."""
        section, _, name = key.rpartition(".")
        scores: dict[str, float] = {}
        for candidate in self.keys():
            other_section, _, other_name = candidate.rpartition(".")
            cutoff = 0.5 if other_section == section or not section else 0.75
            if closest(name, [other_name], cutoff=cutoff):
                scores[candidate] = 0.6 * similarity(name, other_name) + 0.4 * _section_similarity(
                    section, other_section
                )
        best = max(scores.values(), default=0.0)
        matches = sorted((match for match in scores if scores[match] > best - 0.1), key=lambda match: -scores[match])
        return f" Did you mean {' or '.join(repr(match) for match in matches[:3])}?" if matches else ""

    def _described_in(self, section: str) -> str:
        node = self.type_of(section) if section else Config
        return f"{node.__module__.replace('.', '/')}.py"

    def _keys_below(self, prefix: str, node: Any) -> Iterator[str]:
        for name in self._child_names(node):
            yield prefix + name
            yield from self._keys_below(f"{prefix}{name}.", self._child(node, name))

    def _child_names(self, node: Any) -> list[str]:
        if node == _PHASES:
            return list(self.phases)
        return list(setting_types(node)) if dataclasses.is_dataclass(node) else []

    def _child(self, node: Any, name: str) -> Any:
        if node == _PHASES:
            return self.phases.get(name)
        if dataclasses.is_dataclass(node):
            return setting_types(node).get(name)  # pyright: ignore[reportArgumentType]
        if node is Any:
            return Any
        if get_origin(node) is dict:
            return get_args(node)[1]
        children = [self._child(member, name) for member in union_members(node)]
        return next((child for child in children if child is not None), None)


def _section_similarity(first: str, second: str) -> float:
    """Return how similar two sections are, 0..1: the mean over their names if both are equally deep."""
    pairs = list(zip(first.split("."), second.split("."), strict=False))
    equally_deep = first.count(".") == second.count(".")
    return sum(similarity(*pair) for pair in pairs) / len(pairs) if equally_deep else 0.5 * similarity(first, second)
