"""From a YAML file and command-line overrides to checked settings (hydra-core over the schema of `settings`)."""

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
from distav.config.validation import check

__all__ = ["check", "load", "to_yaml"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply `key=value` overrides, and check every value that needs no data.

    Args:
        path: a YAML file that begins with `defaults: [schema, _self_]`.
        overrides: hydra overrides such as `optim.lr=2e-4`.

    Raises:
        UserError: naming the key, its value, what is allowed and the nearest right key.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        near = did_you_mean(
            file.name, [each.name for each in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        )
        raise UserError(f"--config {path}: no such file.{near}")
    kinds: dict[str, str] = {}
    try:
        # Phases are typed by their kind, so the kinds are read before the schema is put together.
        kinds = _phase_kinds(_compose(file, {"phases": {}}, [], open_phases=True))
        phases = {name: OmegaConf.structured(PHASE_KINDS[kind]) for name, kind in kinds.items()}
        for override in overrides:
            if override.startswith("-") or ("=" not in override and not override.startswith("~")):
                raise UserError(f"'{override}' is not an override; write key=value, e.g. optim.lr=2e-4")
            _parse(override)
        tree = _compose(file, {"phases": phases}, list(overrides))
        settings = _to_settings(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{file.name}: {_explain(error, kinds)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file.name} is not valid YAML: {error}") from None
    check(settings)
    return settings


def to_yaml(settings: Config) -> str:
    """Return the settings as YAML that `load` reads back to the same settings."""
    body = OmegaConf.to_yaml(OmegaConf.create(_plain(settings)))
    return "defaults: [schema, _self_]\n" + body


def _compose(file: Path, extra: dict[str, Any], overrides: list[str], open_phases: bool = False) -> DictConfig:
    schema = OmegaConf.create({**_sections(), **extra})
    open_to_any = [schema.deepspeed.extra, schema.model.parser.token_grids, *([schema.phases] if open_phases else [])]
    for free in open_to_any:
        OmegaConf.set_struct(free, False)
    ConfigStore.instance().store("schema", schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(file.parent), version_base="1.3"):
        return compose(file.stem, overrides=overrides)


def _parse(override: str) -> None:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{override} cannot be read as key=value: {str(error).splitlines()[0]}") from None


def _sections() -> dict[str, Any]:
    return {
        each.name: OmegaConf.structured(each.default_factory)
        for each in dataclasses.fields(Config)
        if each.name != "phases" and each.default_factory is not dataclasses.MISSING
    }


def _phase_kinds(tree: DictConfig) -> dict[str, str]:
    phases: Any = OmegaConf.to_container(tree.get("phases") or OmegaConf.create({}))
    if not isinstance(phases, dict):
        raise UserError("phases has to be a mapping from name to settings, e.g. {learn: {kind: contrastive}}")
    kinds: dict[str, str] = {}
    for name, phase in cast(dict[str, Any], phases).items():
        kind: Any = cast(dict[str, Any], phase).get("kind") if isinstance(phase, dict) else None
        if kind not in PHASE_KINDS:
            near = did_you_mean(kind, PHASE_KINDS)
            raise UserError(f"phases.{name}.kind={kind} is not a phase; allowed: {format_list(PHASE_KINDS)}.{near}")
        kinds[str(name)] = str(kind)
    return kinds


def _to_settings(tree: DictConfig) -> Config:
    sections = {each.name: OmegaConf.to_object(tree[each.name]) for each in dataclasses.fields(Config)}
    phases = cast(dict[str, PhaseConfig], sections["phases"])
    for name, phase in phases.items():
        if not isinstance(phase, tuple(PHASE_KINDS.values())) or PHASE_KINDS.get(phase.kind) is not type(phase):
            raise UserError(f"phases.{name}.kind cannot be overridden; change it in the file.")
    return Config(**cast(dict[str, Any], sections))


def _plain(value: Any) -> Any:
    """Dataclasses and enums as the plain values that YAML holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in cast(dict[Any, Any], value).items()}
    return getattr(value, "name", value)


def _explain(error: BaseException, kinds: dict[str, str]) -> str:
    """Put hydra's and omegaconf's complaints in terms of the user's own key."""
    text = str(error)
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
        text += "\n" + str(error)
    keys = re.findall(r"full_key: (\S+)", text)
    reason = next(
        (
            line
            for line in text.splitlines()[::-1]
            if re.search("Value '|Invalid value|Key '", line) and "$" not in line
        ),
        "",
    )
    if not keys:
        return text.splitlines()[0]
    key = keys[-1]
    if "Key '" in reason or not reason:
        siblings = _keys_beside(key, kinds)
        near = did_you_mean(key.split(".")[-1], siblings)
        return f"there is no setting '{key}'.{near} Allowed there: {format_list(siblings, 40)}."
    return f"{key}: {reason}."


def _keys_beside(key: str, kinds: dict[str, str]) -> list[str]:
    """Return the settings that stand where `key` was looked for."""
    node: Any = Config
    for part in key.split(".")[:-1]:
        if node is kinds:
            node = PHASE_KINDS.get(kinds.get(part, ""))
        elif node is Config and part == "phases":
            node = kinds
        else:
            node = {each.name: each.type for each in dataclasses.fields(node)}.get(part)
        if node is None or not (node is kinds or dataclasses.is_dataclass(node)):
            return []
    return list(kinds) if node is kinds else [each.name for each in dataclasses.fields(node)]
