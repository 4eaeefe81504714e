"""Loading of a configuration: YAML file and command-line overrides to validated settings (Hydra)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distav.config.conversion import Converter, to_plain
from distav.config.errors import SettingError, UserError, did_you_mean
from distav.config.overrides import apply_override, check_kind, parse_override
from distav.config.packaged import config_names, resolve_config
from distav.config.phases import PHASE_KINDS
from distav.config.schema import Config
from distav.config.setting_tree import SettingTree
from distav.config.sources import Sources
from distav.config.validation import validate

_PHASES_ALLOWED = "allowed: a mapping from name to settings, e.g. {learn: {kind: contrastive}}."


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration file, apply `key=value` overrides, and check all settings that can be checked without data.

    Args:
        path: YAML file that starts with `defaults: [schema, _self_]`, or the name of a configuration of distav, see
            `distav.config.packaged.resolve_config`.
        overrides: overrides such as `optim.lr=2e-4`, see `distav.config.overrides`.

    Raises:
        UserError: naming the file or the override, the key, its value, what is allowed and the nearest valid key.
    """
    file = resolve_config(path)
    _check_file(file)
    sources = Sources(file, [parse_override(override) for override in overrides])
    try:
        config = _load(sources)
        if _names_own_dataset(sources):
            config.data.synthetic.enabled = False
        validate(config)
    except SettingError as error:
        raise UserError(sources.with_source(error.key, str(error))) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, sources)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid YAML: {error}") from None
    return config


def check(config: Config) -> Config:
    """Return a configuration that was built in Python, after checking it like the values of a file.

    Raises:
        UserError: naming the setting, its value and what is allowed.
    """
    tree = SettingTree({name: type(phase) for name, phase in config.phases.items()})
    try:
        checked = Converter(tree, lambda key: None).config(to_plain(config))
        validate(checked)
    except SettingError as error:
        raise UserError(str(error)) from None
    return checked


def _names_own_dataset(sources: Sources) -> bool:
    """Return whether overrides set `data.root` and nothing of `data.synthetic`; a wrong path is an error then."""
    keys = [override.key for override in sources.overrides]
    return "data.root" in keys and not any(key.startswith("data.synthetic.") for key in keys)


def to_yaml(config: Config) -> str:
    """Return a configuration as YAML that `load` reads back to an equal one."""
    return "defaults: [schema, _self_]\n" + OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def _check_file(file: Path) -> None:
    if not file.is_file():
        names = [config.name for config in file.parent.glob("*.yaml")] if file.parent.is_dir() else []
        raise UserError(
            f"--config {file}: no such file, and no configuration that comes with distav ({', '.join(config_names())})."
            + (did_you_mean(file.name, names) or did_you_mean(str(file), config_names()))
        )
    if file.suffix != ".yaml":
        raise UserError(f"--config {file}: the name of a configuration file ends in .yaml; rename it.")


def _load(sources: Sources) -> Config:
    composed = _compose(sources.file)
    kinds = _phase_kinds(composed)
    tree = SettingTree({name: PHASE_KINDS[kind] for name, kind in kinds.items()})
    # Interpolations can refer to defaults, so the defaults are merged before the interpolations are resolved.
    defaults = {**to_plain(Config()), "phases": {name: to_plain(phase()) for name, phase in tree.phases.items()}}
    try:
        values = cast(DictConfig, OmegaConf.merge(OmegaConf.create(defaults), composed))
    except OmegaConfBaseException:  # The types differ, which the conversion reports by key.
        Converter(tree, sources.text_of).config(cast(dict[str, Any], OmegaConf.to_container(composed)))
        raise
    for number, override in enumerate(sources.overrides):
        try:
            apply_override(override, values, tree)
        except SettingError as error:
            raise UserError(
                Sources(sources.file, sources.overrides[: number + 1]).with_source(error.key, str(error))
            ) from None
    plain: Any = OmegaConf.to_container(values, resolve=True)
    if not isinstance(plain["phases"], dict):
        raise SettingError("phases", f"phases={plain['phases']}: {_PHASES_ALLOWED}")
    for name, phase in plain["phases"].items():
        if name not in tree.phases:
            raise tree.unknown(f"phases.{name}")
        if not isinstance(phase, dict):
            raise SettingError(
                f"phases.{name}", f"phases.{name}={phase}: allowed: the settings of a phase, as a mapping."
            )
        check_kind(f"phases.{name}.kind", cast(dict[str, Any], phase).get("kind"), kinds[name])
    return Converter(tree, sources.text_of).config(plain)


def _compose(file: Path) -> DictConfig:
    """Return the content of the file and of the files that it extends, without the defaults of the schema."""
    ConfigStore.instance().store("schema", OmegaConf.create({}))
    GlobalHydra.instance().clear()
    path = file.resolve()
    with initialize_config_dir(str(path.parent), version_base="1.3"):
        composed = compose(path.stem)
    OmegaConf.set_struct(composed, False)
    return composed


def _phase_kinds(composed: DictConfig) -> dict[str, str]:
    node = composed.get("phases")
    phases: Any = {} if node is None else OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if not isinstance(phases, dict):
        raise SettingError("phases", f"phases={phases}: {_PHASES_ALLOWED}")
    kinds: dict[str, str] = {}
    for name, phase in cast(dict[Any, Any], phases).items():
        kind: Any = cast(dict[str, Any], phase).get("kind") if isinstance(phase, dict) else None
        if not isinstance(name, str):
            raise SettingError(
                "phases", f"phases: {name} is not a text; quote this name of a phase, or choose another."
            )
        key = f"phases.{name}.kind"
        if kind is None:
            raise SettingError(f"phases.{name}", f"{key} is missing; add one of: {', '.join(PHASE_KINDS)}.")
        check_kind(key, kind, kind)
        kinds[name] = str(kind)
    return kinds


def _explain(error: BaseException, sources: Sources) -> str:
    """Return an error message of Hydra or OmegaConf, with the key that it is about."""
    text = str(error)
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
        text += "\n" + str(error)
    reason, keys = text.splitlines()[0], re.findall(r"full_key: (\S+)", text)
    if "must be a DictConfig" in reason:
        reason = "not a mapping from sections to settings, such as optim: {lr: 1e-3}"
    return sources.with_source(keys[-1], f"{keys[-1]}: {reason}") if keys else f"{sources.file}: {reason}"
