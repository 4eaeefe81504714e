"""Learning which events are heard and which seen, and when: from classes of whole clips and what teachers said."""

import torch

from distav.config.phases import EventParsingPhase
from distav.data.pipeline.loader import Batch
from distav.losses.event_parsing import modality_losses, segment_losses, video_losses
from distav.losses.reduction import weighted_mean
from distav.training.loop import Losses, train
from distav.training.run import Run


def run_parsing(run: Run, name: str, settings: EventParsingPhase) -> None:
    """Train the event parser, and the towers where clips are stored."""
    data, device = run.data, run.world.device
    weak = torch.from_numpy(data.events.weak).to(device)
    harvested = data.pseudo_label_events(name, settings)
    if harvested is not None and not harvested[1].all() and run.world.is_main:
        left = int((~harvested[1]).sum())
        run.logger.info(f"phase={name} {left} clips were not looked at, and learn from their weak labels alone")
    stored = None if harvested is None else [torch.from_numpy(part).to(device) for part in harvested]

    def losses_of(batch: Batch, progress: float) -> Losses:
        del progress
        parsed = run.engine(batch, parse=True)
        present, given = batch.valid.float(), weak[batch.ids].float()
        each = {"weak": settings.weak_label_weight * video_losses(parsed["video"], given)}
        if settings.modality_weight:
            smoothing = settings.audio_smoothing, settings.visual_smoothing
            each["modality"] = settings.modality_weight * modality_losses(parsed["modality"], given, smoothing)
        if stored is not None:
            told, looked_at = (part[batch.ids] for part in stored)
            each["segments"] = settings.segment_weight * looked_at * segment_losses(parsed["segments"], told)
        losses = {key: weighted_mean(value, present) for key, value in each.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    rate = run.settings.optim.lr * settings.lr_scale
    train(run, name, settings.epochs, (rate * settings.tower_lr_scale, rate), losses_of)
