"""Overrides of settings on the command line: `key=value`, and `~phases.NAME`, which removes a phase.

The value of a text setting is everything after the first `=`. All other values have Hydra's grammar, in which lists are
written [1, 2] and mappings {a: 1}.
"""

import re
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from distav.config.conversion import escape, null_message
from distav.config.errors import SettingError, UserError, did_you_mean, format_list
from distav.config.phases import PHASE_KINDS
from distav.config.setting_tree import SettingTree
from distav.config.setting_types import is_nullable, is_text


@dataclass(frozen=True)
class Override:
    """An override.

    Attributes:
        text: as written on the command line.
        key: key of the setting.
        value: text of the value; None for a removal.
    """

    text: str
    key: str
    value: str | None


def parse_override(text: str) -> Override:
    """Return the parts of an override.

    Raises:
        UserError: if it is none.
    """
    match = re.fullmatch(r"(\+\+|\+|~)?([^=\s~+-][^=\s]*)(?:=(.*))?", text, re.DOTALL)
    removes = text.startswith("~")
    if match is None or (match[3] is None) != removes:
        usage = "write ~NAME to remove a phase" if removes else "write key=value, e.g. optim.lr=2e-4"
        raise UserError(f"command line: '{text}' is not an override; {usage}.")
    return Override(text, match[2], match[3])


def apply_override(override: Override, config: DictConfig, tree: SettingTree) -> None:
    """Apply an override to a configuration; a removed phase is removed from `tree` too.

    Raises:
        SettingError: for an unknown key, a removal that is not possible, or another kind of a phase.
    """
    key, value = override.key, override.value
    if value is None:
        _remove(key, config, tree)
        return
    annotation = tree.type_of(key)
    if annotation is None:
        raise tree.unknown(key)
    if re.fullmatch(r"phases\.[^.]+\.kind", key):
        check_kind(key, value, OmegaConf.select(config, key))
    if not is_text(annotation):
        OmegaConf.update(config, key, _parse_value(value), merge=True)
    elif value != "null":
        OmegaConf.update(config, key, escape(value))
    elif is_nullable(annotation):
        OmegaConf.update(config, key, None)
    else:
        raise SettingError(key, null_message(key))


def check_kind(key: str, kind: object, kind_in_file: object) -> None:
    """Check that a phase has the kind of the file.

    Raises:
        SettingError: if it does not.
    """
    if kind not in PHASE_KINDS:
        raise SettingError(
            key,
            f"{key}={kind}: not a kind of phase; allowed: {format_list(PHASE_KINDS)}.{did_you_mean(kind, PHASE_KINDS)}",
        )
    if kind != kind_in_file:
        raise SettingError(
            key,
            f"{key}={kind}: the kind of a phase cannot be overridden, because it determines the settings of the phase; "
            f"it is {kind_in_file}. Change it in the file.",
        )


def _remove(key: str, config: DictConfig, tree: SettingTree) -> None:
    if tree.type_of(key) is None:
        raise tree.unknown(key)
    section, _, name = key.rpartition(".")
    if section == "phases":
        del tree.phases[name]
    elif not tree.is_entry(key):
        raise SettingError(
            key,
            f"{key} cannot be removed; only phases (~phases.NAME) and entries of {' and '.join(tree.free_settings())} "
            f"can. Set another value: {key}=VALUE.",
        )
    parent: Any = OmegaConf.select(config, section)
    if not isinstance(parent, DictConfig) or name not in parent:
        entries = list(parent) if isinstance(parent, DictConfig) else []
        raise SettingError(
            key,
            f"there is no entry '{name}' in {section}; it has: {format_list(entries) or 'none'}."
            f"{did_you_mean(name, entries)}",
        )
    del parent[name]


def _parse_value(text: str) -> Any:
    """Return a value in Hydra's grammar; a text that has another form is returned as it is."""
    try:
        parsed = OverridesParser.create().parse_override(f"value={text}")
        return text if parsed.is_sweep_override() else parsed.value()
    except HydraException:
        return text
