"""Event parsing phase: weakly supervised audio-visual event parsing (HAN and VALOR), with or without pseudo-labels."""

import torch

from distav.config.phases import EventParsingPhase
from distav.data.pipeline.loader import Batch
from distav.losses.event_parsing import modality_losses, segment_losses, video_losses
from distav.losses.reduction import weighted_mean
from distav.training.loop import Losses, train
from distav.training.run import Run


def run_parsing(run: Run, name: str, config: EventParsingPhase) -> None:
    """Train the event parser, and the towers if the dataset stores clips."""
    data, device = run.data, run.world.device
    weak_labels = torch.from_numpy(data.events.weak).to(device)
    pseudo_labels, scored = None, None
    stored = data.pseudo_label_events(name, config)
    if stored is not None:
        pseudo_labels, scored = torch.from_numpy(stored[0]).to(device), torch.from_numpy(stored[1]).to(device)
        num_missing = int((~stored[1]).sum())
        if num_missing and run.world.is_main:
            run.logger.info(
                f"phase={name} {num_missing} clips have no pseudo-labels; training uses their weak labels only"
            )

    def losses_of(batch: Batch, _progress: float) -> Losses:
        outputs = run.engine(batch, parse=True)
        present, weak = batch.valid.float(), weak_labels[batch.ids].float()
        losses = {"weak": config.weak_label_weight * video_losses(outputs["video"], weak)}
        if config.modality_weight:
            smoothing = config.audio_smoothing, config.visual_smoothing
            losses["modality"] = config.modality_weight * modality_losses(outputs["modality"], weak, smoothing)
        if pseudo_labels is not None and scored is not None:
            segments = segment_losses(outputs["segments"], pseudo_labels[batch.ids])
            losses["segments"] = config.segment_weight * scored[batch.ids] * segments
        means = {term: weighted_mean(values, present) for term, values in losses.items()}
        return {"loss": torch.stack(list(means.values())).sum(), **means}

    rate = run.config.optim.lr * config.lr_scale
    train(run, name, config.epochs, (rate * config.tower_lr_scale, rate), losses_of)
