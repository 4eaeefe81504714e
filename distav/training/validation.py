"""Check of the names of components in a configuration: objectives, losses, towers and trackers."""

from pathlib import Path

from distav.config.errors import UserError, format_list
from distav.config.phases import ContrastivePhase, EventParsingPhase, LabelCorrectionPhase, SupervisedPhase
from distav.config.schema import Config
from distav.data.data_module import DataModule
from distav.data.dataset import ShardedDataset
from distav.losses.classification import CLASSIFICATION_LOSSES
from distav.losses.contrastive_objectives import select_objective
from distav.models.av_model import check_towers
from distav.training.checkpoint.mirror import RunMirror
from distav.training.trackers.registry import check_trackers


def validate_names(config: Config) -> None:
    """Check that all components that a configuration names exist, and that objectives and mirrors have valid settings.

    Loading a configuration cannot check this, since the registries of the components are in packages above it.

    Raises:
        UserError: naming the key, its value, what is allowed and the nearest valid name.
    """
    if config.run.mirror:
        RunMirror(config.run.mirror, Path(config.run.root) / config.run.name, config.run.keep_checkpoints)
    check_trackers(config.monitor.trackers)
    check_towers(config.model, any(isinstance(phase, EventParsingPhase) for phase in config.phases.values()))
    for name, phase in config.phases.items():
        key = f"phases.{name}"
        if isinstance(phase, ContrastivePhase):
            select_objective(phase, key).validate(phase, key)
        if isinstance(phase, SupervisedPhase):
            loss = CLASSIFICATION_LOSSES.select(phase.loss, f"{key}.loss")
            if phase.mixup and loss.keeps_predictions:
                raise UserError(
                    f"{key}.mixup={phase.mixup:g}: allowed: 0 with {key}.loss={phase.loss}, which stores "
                    "predictions of single clips."
                )


def validate_labels(config: Config, data: DataModule) -> None:
    """Check that there are classes to distinguish, and that all losses accept the labels of a multi-label dataset.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    if not data.shards.multi_label:
        _check_num_classes(config, data.shards)
        return
    allowed = [name for name, loss in CLASSIFICATION_LOSSES.items() if loss.multi_label]
    for name, phase in config.phases.items():
        if isinstance(phase, SupervisedPhase) and phase.loss not in allowed:
            raise UserError(
                f"phases.{name}.loss={phase.loss}: clips of {data.shards.location} may have several classes; allowed: "
                f"{format_list(allowed)}."
            )


def _check_num_classes(config: Config, shards: ShardedDataset) -> None:
    for name, phase in config.phases.items():
        if len(shards.classes) < 2 and isinstance(phase, LabelCorrectionPhase | SupervisedPhase):
            raise UserError(
                f"phases.{name}: all clips of {shards.location} have the label {shards.classes[0]}; allowed: two or "
                "more classes. Add clips of other classes, or keep only phases of kind contrastive."
            )
