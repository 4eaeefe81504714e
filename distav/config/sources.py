"""Where the settings of a configuration come from: the command line, the file, or a file that it extends."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from distav.config.overrides import Override


class Sources:
    """Sources of the settings of a configuration.

    Attributes:
        file: the file.
        overrides: the overrides that follow it.
    """

    def __init__(self, file: Path, overrides: list[Override]):
        self.file, self.overrides = file, overrides

    def with_source(self, key: str, message: str) -> str:
        """Return a message about a setting that begins with the source of the setting, if it is not the default."""
        override = self._override_of(key)
        if override:
            return f"command line{'' if override in message else f' ({override})'}: {message}"
        file = next((path for path, _ in self._values(self.file, key)), None)
        return f"{file}: {message}" if file else message

    def text_of(self, key: str) -> str | None:
        """Return the text that the file has for a setting; None if an override replaces it, or if it is no text."""
        value = None if self._override_of(key) else next((value for _, value in self._values(self.file, key)), None)
        return value if isinstance(value, str) else None

    def _override_of(self, key: str) -> str:
        """Return the last override of a setting, of a section that contains it, or of a part of it."""
        related = [override.text for override in self.overrides if override.key == key or _overlap(override, key)]
        return related[-1] if related else ""

    def _values(self, file: Path, key: str) -> Iterator[tuple[Path, Any]]:
        """Yield the file and value for each file that has the key; files with precedence first."""
        try:
            content = yaml.load(file.read_text(), yaml.BaseLoader)  # Keeps every scalar as its text.
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return
        if not isinstance(content, dict):
            return
        defaults = cast(dict[str, Any], content).get("defaults")
        names = cast(list[Any], defaults) if isinstance(defaults, list) else []
        for name in reversed(names if "_self_" in names else [*names, "_self_"]):
            if name == "_self_":
                value = _lookup(content, key)
                if value is not None:
                    yield file, value
            elif isinstance(name, str) and name != "schema":
                yield from self._values(file.parent / f"{name}.yaml", key)


def _overlap(override: Override, key: str) -> bool:
    """Return whether an override sets a section that contains a setting, or a part of it."""
    first, second = f"{override.key}.", f"{key}."
    return override.value is not None and (first.startswith(second) or second.startswith(first))


def _lookup(content: Any, key: str) -> Any:
    """Return the value of a dotted key; None if there is none."""
    if not isinstance(content, dict):
        return None
    entries = cast(dict[str, Any], content)
    if key in entries:
        return entries[key]
    name, _, rest = key.partition(".")
    return _lookup(entries.get(name), rest) if rest else None
