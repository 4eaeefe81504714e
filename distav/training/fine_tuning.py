"""Training of the towers and classifiers of an exported network on a labeled dataset, in a run of its own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distav.config.phases import PhaseConfig, SupervisedPhase, Targets
from distav.config.schema import Config, DataConfig, OptimConfig, RunConfig
from distav.config.validation import validate
from distav.distributed.process_group import World
from distav.models.pretrained import model_config
from distav.training.phases.registry import run_remaining
from distav.training.report import write_report
from distav.training.run_setup import open_run


@dataclass(frozen=True)
class FineTuning:
    """Settings of the training.

    Attributes:
        epochs: passes over the training split.
        warmup_epochs: passes before them, in which the classifiers alone are trained.
        lr: learning rate of the classifiers.
        tower_lr_scale: factor on it for the towers.
        global_batch: samples per step over all ranks.
    """

    epochs: int
    warmup_epochs: int
    lr: float
    tower_lr_scale: float
    global_batch: int


def fine_tune(
    settings: FineTuning,
    run: RunConfig,
    data: DataConfig,
    export: Path,
    description: dict[str, Any],
    multi_label: bool,
    world: World,
) -> Path:
    """Train a network, or resume its training; returns the `export/` directory of the run.

    Args:
        settings: epochs and learning rates.
        run: name and directory of the run.
        data: dataset, and clips that the network takes.
        export: `export/` directory with the initial weights.
        description: its `config.json`.
        multi_label: whether clips have several labels.
        world: this rank.

    Raises:
        UserError: for settings or data that cannot be used.
    """
    targets, loss = Targets.given, "bce" if multi_label else "ce"
    phases: dict[str, PhaseConfig] = {}
    if settings.warmup_epochs:
        phases["warmup"] = SupervisedPhase(
            epochs=settings.warmup_epochs, targets=targets, loss=loss, tower_lr_scale=0.0
        )
    phases["fine_tune"] = SupervisedPhase(
        epochs=settings.epochs, targets=targets, loss=loss, tower_lr_scale=settings.tower_lr_scale
    )
    config = Config(
        run=run,
        data=data,
        model=replace(model_config(description), pretrained=str(export)),
        optim=OptimConfig(global_batch=settings.global_batch, lr=settings.lr),
        phases=phases,
    )
    validate(config)
    with open_run(config, world) as opened:
        run_remaining(opened)
        write_report(opened)
        return opened.folder / "export"
