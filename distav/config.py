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

from distav.errors import UserError, listed, nearest
from distav.phase_settings import (
    NEED_CORRECTION,
    PHASE_KINDS,
    Candidates,
    ContrastivePhase,
    InstanceLoss,
    PhaseSettings,
    SoftTargets,
    SupervisedPhase,
)
from distav.settings import Settings

__all__ = ["check", "load", "to_yaml"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a configuration file, apply `key=value` overrides, and check every value that needs no data.

    Args:
        path: a YAML file that begins with `defaults: [schema, _self_]`.
        overrides: hydra overrides such as `optim.lr=2e-4`.

    Raises:
        UserError: naming the key, its value, what is allowed and the nearest right key.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        near = nearest(file.name, [each.name for each in file.parent.glob("*.yaml")] if file.parent.is_dir() else [])
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


def to_yaml(settings: Settings) -> str:
    """Return the settings as YAML that `load` reads back to the same settings."""
    body = OmegaConf.to_yaml(OmegaConf.create(_plain(settings)))
    return "defaults: [schema, _self_]\n" + body


def check(settings: Settings) -> None:
    """Refuse values that no data could make right.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    _require(settings.optim.global_batch > 1, "optim.global_batch", settings.optim.global_batch, "2 or more")
    at_least_one = {
        "optim.accumulation": settings.optim.accumulation,
        "data.num_frames": settings.data.num_frames,
        "data.frame_stride": settings.data.frame_stride,
        "data.frame_size": settings.data.frame_size,
        "data.shuffle_block": settings.data.shuffle_block,
        "data.decode_threads": settings.data.decode_threads,
        "data.prefetch": settings.data.prefetch,
        "run.log_every": settings.run.log_every,
        "run.max_skipped_steps": settings.run.max_skipped_steps,
        "run.checkpoint_every": settings.run.checkpoint_every,
        "monitor.media_every": settings.monitor.media_every,
        "model.visual.patch": settings.model.visual.patch,
        "model.visual.tubelet": settings.model.visual.tubelet,
        "model.audio.patch": settings.model.audio.patch,
        "model.audio.num_mels": settings.model.audio.num_mels,
        "model.visual.width": settings.model.visual.width,
        "model.audio.width": settings.model.audio.width,
        "model.embed_dim": settings.model.embed_dim,
        "model.hidden_dim": settings.model.hidden_dim,
    }
    for key, value in at_least_one.items():
        _require(value >= 1, key, value, "a whole number from 1 up")
    _require(settings.run.keep_checkpoints >= 2, "run.keep_checkpoints", settings.run.keep_checkpoints, "2 or more")
    shares = {
        "data.max_bad_fraction": settings.data.max_bad_fraction,
        "augment.flip": settings.augment.flip,
        "bank.momentum": settings.bank.momentum,
        "model.dropout": settings.model.dropout,
        "optim.warmup_fraction": settings.optim.warmup_fraction,
        "optim.min_lr_fraction": settings.optim.min_lr_fraction,
        "model.audio.mask_mels": settings.model.audio.mask_mels,
        "model.audio.mask_time": settings.model.audio.mask_time,
    }
    for key, value in shares.items():
        _require(0 <= value <= 1, key, value, "0 to 1")
    _require(bool(re.fullmatch(r"[\w.-]+", settings.run.name)), "run.name", settings.run.name, "letters, digits, . _ -")
    none_below_zero = {
        "run.seed": settings.run.seed,
        "run.threads_per_rank": settings.run.threads_per_rank,
        "optim.spike_skip": settings.optim.spike_skip,
        "optim.weight_decay": settings.optim.weight_decay,
        "optim.grad_clip": settings.optim.grad_clip,
        "model.num_categories": settings.model.num_categories,
        "monitor.media_clips": settings.monitor.media_clips,
        "bank.replicate_below_mib": settings.bank.replicate_below_mib,
    }
    for key, value in none_below_zero.items():
        _require(value >= 0, key, value, "0 or more")
    for key, value in {"optim.beta1": settings.optim.beta1, "optim.beta2": settings.optim.beta2}.items():
        _require(0 <= value < 1, key, value, "0 up to, not including, 1")
    spike = settings.optim.spike_factor
    _require(spike == 0 or spike > 1, "optim.spike_factor", spike, "0 for never, or a factor above 1")
    _require(settings.run.timeout_s > 0, "run.timeout_s", settings.run.timeout_s, "seconds above 0")
    _require(settings.optim.lr > 0, "optim.lr", settings.optim.lr, "a number above 0")
    _require(settings.data.audio_s > 0, "data.audio_s", settings.data.audio_s, "seconds above 0")
    _require(0 < settings.augment.crop_area_min <= 1, "augment.crop_area_min", settings.augment.crop_area_min, "0 to 1")
    _require(
        0 <= settings.augment.shift_s <= 0.5,
        "augment.shift_s",
        settings.augment.shift_s,
        "0 to 0.5 seconds, since a larger shift makes mismatched pairs",
    )
    _require(
        settings.deepspeed.zero_stage in (0, 1, 2, 3),
        "deepspeed.zero_stage",
        settings.deepspeed.zero_stage,
        "0, 1, 2 or 3",
    )
    _require(bool(settings.phases), "phases", "{}", "at least one phase, e.g. {learn: {kind: contrastive}}")
    corrected = False
    for name, phase in settings.phases.items():
        _check_phase(name, phase)
        corrected = corrected or phase.kind == "correction"
        if isinstance(phase, SupervisedPhase) and phase.targets in NEED_CORRECTION and not corrected:
            raise UserError(
                f"phases.{name}.targets={phase.targets.name}: needs a phase with kind: correction before it; add one, "
                "or learn from targets: given."
            )


_SHARES = ("soft_weight", "weight_min", "trust_after", "whitening", "refine_threshold")
_FROM_ZERO = ("second", "negatives", "signal_nats", "refine_after_epochs")


def _check_phase(name: str, phase: PhaseSettings) -> None:
    for key, value in dataclasses.asdict(phase).items():
        where = f"phases.{name}.{key}"
        several: list[Any] = cast(list[Any], value) if isinstance(value, list) else [value]
        _require(bool(several), where, several, "at least one value to choose among")
        for each in several:
            if key.endswith(("temperature", "temperatures", "_q")):
                _require(each > 0, where, each, "a number above 0")
            elif key in _SHARES or key.endswith("momentum"):
                _require(0 <= each <= 1, where, each, "0 to 1")
            elif key == "matching_candidates":
                _require(each >= 2, where, each, "2 or more")
            elif key in ("epochs", "neighbors", "width"):
                _require(each >= 1, where, each, "a whole number from 1 up")
            elif key.endswith(("weight", "scale", "ramp", "memory")) or key in _FROM_ZERO:
                _require(each >= 0, where, each, "0 or more")

    if isinstance(phase, ContrastivePhase):
        _check_instance_loss(f"phases.{name}", phase)


def _check_instance_loss(where: str, phase: ContrastivePhase) -> None:
    in_batch, acl = phase.candidates is Candidates.batch, phase.loss is InstanceLoss.acl
    if in_batch and phase.negatives:
        raise UserError(
            f"{where}.negatives={phase.negatives}: rows are drawn from the bank; set {where}.candidates=bank, or "
            "negatives=0 for the batch."
        )
    if acl and not in_batch and not phase.negatives:
        raise UserError(
            f"{where}.loss=acl: is taken over some candidates, not the whole bank; set {where}.candidates=batch, or "
            f"{where}.negatives to the rows to draw, e.g. 127."
        )
    if acl and phase.nce:
        raise UserError(f"{where}.nce=true: is another loss than acl; set {where}.loss=xid or nce=false.")
    if phase.nce and not phase.negatives:
        raise UserError(
            f"{where}.nce=true: needs drawn rows; set {where}.negatives (AVID: 1024), or nce=false for the "
            "softmax over the whole bank."
        )
    if phase.candidates is Candidates.batch or phase.negatives:
        what = f"{where}.candidates=batch" if in_batch else f"{where}.negatives={phase.negatives}"
        if not acl and phase.soft_targets is not SoftTargets.none:
            raise UserError(
                f"{where}.soft_targets={phase.soft_targets.name}: {what} goes with hard targets alone; set "
                f"{where}.soft_targets=none, or candidates=bank and negatives=0 for the whole bank."
            )
        if phase.mask_unvisited:
            raise UserError(f"{where}.mask_unvisited=true: is for the whole bank, and not for {what}.")


def _require(right: bool, key: str, value: object, allowed: str) -> None:
    if not right:
        raise UserError(f"{key}={value} is not possible; allowed: {allowed}.")


def _compose(file: Path, extra: dict[str, Any], overrides: list[str], open_phases: bool = False) -> DictConfig:
    schema = OmegaConf.create({**_sections(), **extra})
    for free in (schema.deepspeed.extra, schema.phases) if open_phases else (schema.deepspeed.extra,):
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
        for each in dataclasses.fields(Settings)
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
            near = nearest(kind, PHASE_KINDS)
            raise UserError(f"phases.{name}.kind={kind} is not a phase; allowed: {listed(PHASE_KINDS)}.{near}")
        kinds[str(name)] = str(kind)
    return kinds


def _to_settings(tree: DictConfig) -> Settings:
    sections = {each.name: OmegaConf.to_object(tree[each.name]) for each in dataclasses.fields(Settings)}
    phases = cast(dict[str, PhaseSettings], sections["phases"])
    for name, phase in phases.items():
        if not isinstance(phase, tuple(PHASE_KINDS.values())) or PHASE_KINDS.get(phase.kind) is not type(phase):
            raise UserError(f"phases.{name}.kind cannot be overridden; change it in the file.")
    return Settings(**cast(dict[str, Any], sections))


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
        near = nearest(key.split(".")[-1], siblings)
        return f"there is no setting '{key}'.{near} Allowed there: {listed(siblings, 40)}."
    return f"{key}: {reason}."


def _keys_beside(key: str, kinds: dict[str, str]) -> list[str]:
    """Return the settings that stand where `key` was looked for."""
    node: Any = Settings
    for part in key.split(".")[:-1]:
        if node is kinds:
            node = PHASE_KINDS.get(kinds.get(part, ""))
        elif node is Settings and part == "phases":
            node = kinds
        else:
            node = {each.name: each.type for each in dataclasses.fields(node)}.get(part)
        if node is None or not (node is kinds or dataclasses.is_dataclass(node)):
            return []
    return list(kinds) if node is kinds else [each.name for each in dataclasses.fields(node)]
