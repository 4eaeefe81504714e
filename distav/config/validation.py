"""Refuses settings that no data could make right, with the key, the value and what is allowed."""

import dataclasses
import re
from typing import Any, cast

from distav.config.errors import UserError
from distav.config.phases import (
    NEED_CORRECTION,
    ContrastivePhase,
    EventParsingPhase,
    InstanceLoss,
    NegativesSource,
    PhaseConfig,
    SoftTargetKind,
    SupervisedPhase,
)
from distav.config.schema import Config


def check(settings: Config) -> None:
    """Refuse values that no data could make right.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    _require(settings.optim.global_batch > 1, "optim.global_batch", settings.optim.global_batch, "2 or more")
    at_least_one = {
        "optim.gradient_accumulation_steps": settings.optim.gradient_accumulation_steps,
        "data.num_frames": settings.data.num_frames,
        "data.frame_stride": settings.data.frame_stride,
        "data.frame_size": settings.data.frame_size,
        "data.shuffle_block_shards": settings.data.shuffle_block_shards,
        "data.prefetch": settings.data.prefetch,
        "run.log_every": settings.run.log_every,
        "run.max_consecutive_skipped_steps": settings.run.max_consecutive_skipped_steps,
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
        "model.parser.width": settings.model.parser.width,
        "model.parser.depth": settings.model.parser.depth,
        "model.parser.heads": settings.model.parser.heads,
        "model.parser.ffn_dim": settings.model.parser.ffn_dim,
    }
    for key, value in at_least_one.items():
        _require(value >= 1, key, value, "a whole number from 1 up")
    threads = settings.data.decode_threads
    _require(threads >= 0, "data.decode_threads", threads, "a whole number from 1 up, or 0 to choose by the device")
    _require(settings.run.keep_checkpoints >= 2, "run.keep_checkpoints", settings.run.keep_checkpoints, "2 or more")
    shares = {
        "data.max_quarantined_fraction": settings.data.max_quarantined_fraction,
        "augment.flip_prob": settings.augment.flip_prob,
        "memory_bank.momentum": settings.memory_bank.momentum,
        "model.dropout": settings.model.dropout,
        "model.parser.dropout": settings.model.parser.dropout,
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
        "data.cache_mib": settings.data.cache_mib,
        "optim.loss_spike_skip_batches": settings.optim.loss_spike_skip_batches,
        "optim.weight_decay": settings.optim.weight_decay,
        "optim.grad_clip": settings.optim.grad_clip,
        "model.num_categories": settings.model.num_categories,
        "monitor.media_clips": settings.monitor.media_clips,
        "memory_bank.replicate_below_mib": settings.memory_bank.replicate_below_mib,
    }
    for key, value in none_below_zero.items():
        _require(value >= 0, key, value, "0 or more")
    for key, value in {"optim.beta1": settings.optim.beta1, "optim.beta2": settings.optim.beta2}.items():
        _require(0 <= value < 1, key, value, "0 up to, not including, 1")
    spike = settings.optim.loss_spike_factor
    _require(spike == 0 or spike > 1, "optim.loss_spike_factor", spike, "0 for never, or a factor above 1")
    parser = settings.model.parser
    heads = f"a divisor of model.parser.width={parser.width}"
    _require(parser.width % parser.heads == 0, "model.parser.heads", parser.heads, heads)
    for name, grid in parser.token_grids.items():
        _require(
            len(grid) == 2 and min(grid) > 0, f"model.parser.token_grids.{name}", grid, "rows and columns, e.g. [2, 32]"
        )
    _require(settings.run.timeout_s > 0, "run.timeout_s", settings.run.timeout_s, "seconds above 0")
    _require(settings.optim.lr > 0, "optim.lr", settings.optim.lr, "a number above 0")
    _require(settings.data.audio_s > 0, "data.audio_s", settings.data.audio_s, "seconds above 0")
    _require(0 < settings.augment.crop_area_min <= 1, "augment.crop_area_min", settings.augment.crop_area_min, "0 to 1")
    _require(
        0 <= settings.augment.audio_shift_s <= 0.5,
        "augment.audio_shift_s",
        settings.augment.audio_shift_s,
        "0 to 0.5 seconds, since a larger shift makes mismatched pairs",
    )
    _require(
        settings.deepspeed.zero_stage in (None, 0, 1, 2, 3),
        "deepspeed.zero_stage",
        settings.deepspeed.zero_stage,
        "0, 1, 2 or 3, or null for 1 on a GPU and 0 on a CPU",
    )
    _require(bool(settings.phases), "phases", "{}", "at least one phase, e.g. {learn: {kind: contrastive}}")
    corrected = False
    for name, phase in settings.phases.items():
        if isinstance(phase, EventParsingPhase):
            for modality, tower in (("visual", settings.model.visual.name), ("audio", settings.model.audio.name)):
                what = f"a convolutional tower, since phases.{name} gives it single seconds of a clip"
                _require(not tower.startswith("vit_"), f"model.{modality}.name", tower, what)
        _check_phase(name, phase)
        corrected = corrected or phase.kind == "label_correction"
        if isinstance(phase, SupervisedPhase) and phase.targets in NEED_CORRECTION and not corrected:
            raise UserError(
                f"phases.{name}.targets={phase.targets.name}: needs a phase with kind: label_correction before it; add one, "
                "or learn from targets: given."
            )


_SHARES = (
    "soft_target_weight",
    "min_pair_weight",
    "pair_weighting_start",
    "whitening_powers",
    "correspondence_threshold",
    "full_trust_quantile",
    "audio_smoothing",
    "visual_smoothing",
)
_FROM_ZERO = (
    "second_round_neighbors",
    "num_negatives",
    "min_log_likelihood_gain",
    "refinement_warmup_epochs",
    "category_warmup_fraction",
)


def _check_phase(name: str, phase: PhaseConfig) -> None:
    for key, value in dataclasses.asdict(phase).items():
        where = f"phases.{name}.{key}"
        several: list[Any] = cast(list[Any], value) if isinstance(value, list) else [value]
        _require(bool(several), where, several, "at least one value to choose among")
        for each in several:
            if key.endswith(("temperature", "temperatures", "_q")):
                _require(each > 0, where, each, "a number above 0")
            elif key in _SHARES or key.endswith("momentum"):
                _require(0 <= each <= 1, where, each, "0 to 1")
            elif key == "matching_reference_size":
                _require(each >= 2, where, each, "2 or more")
            elif key in ("epochs", "num_neighbors", "num_components"):
                _require(each >= 1, where, each, "a whole number from 1 up")
            elif key.endswith(("weight", "scale", "ramp", "memory")) or key in _FROM_ZERO:
                _require(each >= 0, where, each, "0 or more")

    if isinstance(phase, ContrastivePhase):
        _check_instance_loss(f"phases.{name}", phase)


def _check_instance_loss(where: str, phase: ContrastivePhase) -> None:
    in_batch, acl = phase.negatives_source is NegativesSource.batch, phase.loss is InstanceLoss.acl
    if in_batch and phase.num_negatives:
        raise UserError(
            f"{where}.num_negatives={phase.num_negatives}: rows are drawn from the bank; set {where}.negatives_source=memory_bank, or "
            "num_negatives=0 for the batch."
        )
    if acl and not in_batch and not phase.num_negatives:
        raise UserError(
            f"{where}.loss=acl: is taken over some candidates, not the whole bank; set {where}.negatives_source=batch, or "
            f"{where}.negatives to the rows to draw, e.g. 127."
        )
    if acl and phase.nce:
        raise UserError(f"{where}.nce=true: is another loss than acl; set {where}.loss=xid or nce=false.")
    if phase.nce and not phase.num_negatives:
        raise UserError(
            f"{where}.nce=true: needs drawn rows; set {where}.negatives (AVID: 1024), or nce=false for the "
            "softmax over the whole bank."
        )
    if in_batch or phase.num_negatives:
        what = f"{where}.negatives_source=batch" if in_batch else f"{where}.num_negatives={phase.num_negatives}"
        if not acl and phase.soft_targets is not SoftTargetKind.none:
            raise UserError(
                f"{where}.soft_targets={phase.soft_targets.name}: {what} goes with hard targets alone; set "
                f"{where}.soft_targets=none, or negatives_source=memory_bank and num_negatives=0 for the whole bank."
            )
        if phase.mask_uninitialized:
            raise UserError(f"{where}.mask_uninitialized=true: is for the whole bank, and not for {what}.")


def _require(right: bool, key: str, value: object, allowed: str) -> None:
    if not right:
        raise UserError(f"{key}={value} is not possible; allowed: {allowed}.")
