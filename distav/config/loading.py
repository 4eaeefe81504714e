"""Loading of a configuration: YAML file and command-line overrides to validated settings (Hydra)."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distav.config.errors import UserError, did_you_mean, format_list
from distav.config.phases import PHASE_KINDS, PhaseConfig
from distav.config.schema import Config
from distav.config.validation import validate


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration file, apply `key=value` overrides, and check all settings that can be checked without data.

    Args:
        path: YAML file that starts with `defaults: [schema, _self_]`.
        overrides: Hydra overrides such as `optim.lr=2e-4`.

    Raises:
        UserError: naming the key, its value, what is allowed and the nearest valid key.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        names = [config.name for config in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise UserError(f"--config {path}: no such file.{did_you_mean(file.name, names)}")
    kinds: dict[str, str] = {}
    try:
        # The kind of a phase determines its type, so the kinds are read before the schema is complete.
        kinds = _phase_kinds(_compose(file, {"phases": {}}, [], open_phases=True))
        phases = {name: OmegaConf.structured(PHASE_KINDS[kind]) for name, kind in kinds.items()}
        for override in overrides:
            if override.startswith("-") or ("=" not in override and not override.startswith("~")):
                raise UserError(f"'{override}' is not an override; write key=value, e.g. optim.lr=2e-4")
            _parse(override)
        config = _to_config(_compose(file, {"phases": phases}, list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{file.name}: {_explain(error, kinds)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file.name} is not valid YAML: {error}") from None
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML that `load` reads back to an equal one."""
    body = OmegaConf.to_yaml(OmegaConf.create(_plain(config)))
    return "defaults: [schema, _self_]\n" + body


def _compose(file: Path, extra: dict[str, Any], overrides: list[str], open_phases: bool = False) -> DictConfig:
    schema = OmegaConf.create({**_sections(), **extra})
    open_nodes = [schema.deepspeed.extra, schema.model.parser.token_grids]
    if open_phases:
        open_nodes.append(schema.phases)
    for node in open_nodes:
        OmegaConf.set_struct(node, False)
    ConfigStore.instance().store("schema", schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(file.parent), version_base="1.3"):
        return compose(file.stem, overrides=overrides)


def _parse(override: str) -> None:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{override} cannot be parsed as key=value: {str(error).splitlines()[0]}") from None


def _sections() -> dict[str, Any]:
    return {
        section.name: OmegaConf.structured(section.default_factory)
        for section in dataclasses.fields(Config)
        if section.name != "phases" and section.default_factory is not dataclasses.MISSING
    }


def _phase_kinds(tree: DictConfig) -> dict[str, str]:
    phases: Any = OmegaConf.to_container(tree.get("phases") or OmegaConf.create({}))
    if not isinstance(phases, dict):
        raise UserError("phases has to be a mapping from name to settings, e.g. {learn: {kind: contrastive}}")
    kinds: dict[str, str] = {}
    for name, phase in cast(dict[str, Any], phases).items():
        kind: Any = cast(dict[str, Any], phase).get("kind") if isinstance(phase, dict) else None
        PHASE_KINDS.select(str(kind), f"phases.{name}.kind")
        kinds[str(name)] = str(kind)
    return kinds


def _to_config(tree: DictConfig) -> Config:
    sections = {section.name: OmegaConf.to_object(tree[section.name]) for section in dataclasses.fields(Config)}
    phases = cast(dict[str, PhaseConfig], sections["phases"])
    for name, phase in phases.items():
        if PHASE_KINDS.get(getattr(phase, "kind", "")) is not type(phase):
            raise UserError(f"phases.{name}.kind cannot be overridden; change it in the file.")
    return Config(**cast(dict[str, Any], sections))


def _plain(value: Any) -> Any:
    """Return dataclasses and enums as the plain values that YAML stores."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {setting.name: _plain(getattr(value, setting.name)) for setting in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in cast(dict[Any, Any], value).items()}
    return getattr(value, "name", value)


def _explain(error: BaseException, kinds: dict[str, str]) -> str:
    """Return an error message of Hydra or OmegaConf in terms of the user's key."""
    text = str(error)
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
        text += "\n" + str(error)
    keys = re.findall(r"full_key: (\S+)", text)
    if not keys:
        return text.splitlines()[0]
    key = keys[-1]
    reasons = [line for line in text.splitlines() if re.search("Value '|Invalid value|Key '", line) and "$" not in line]
    if not reasons or "Key '" in reasons[-1]:
        siblings = _sibling_keys(key, kinds)
        suggestion = did_you_mean(key.split(".")[-1], siblings)
        return f"there is no setting '{key}'.{suggestion} Allowed: {format_list(siblings, 40)}."
    return f"{key}: {reasons[-1]}."


def _sibling_keys(key: str, kinds: dict[str, str]) -> list[str]:
    """Return the names of all settings in the section that `key` names."""
    node: Any = Config
    for part in key.split(".")[:-1]:
        if node is kinds:
            node = PHASE_KINDS.get(kinds.get(part, ""))
        elif node is Config and part == "phases":
            node = kinds
        else:
            node = {setting.name: setting.type for setting in dataclasses.fields(node)}.get(part)
        if node is None or not (node is kinds or dataclasses.is_dataclass(node)):
            return []
    return list(kinds) if node is kinds else [setting.name for setting in dataclasses.fields(node)]
