"""Learning which events are heard and which seen, and when: from classes of whole clips and what teachers said."""

from pathlib import Path

import torch

from distav.data.events import read_events
from distav.data.loader import Batch
from distav.losses.instance import weighted_mean
from distav.losses.parsing import modality_losses, segment_losses, video_losses
from distav.phase_settings import ParsingPhase
from distav.phases.loop import Losses, train
from distav.run import Run


def run_parsing(run: Run, name: str, settings: ParsingPhase) -> None:
    """Train the event parser, and the towers where clips are stored.

    Raises:
        UserError: for a table of harvested events that does not fit the set.
    """
    data, device = run.data, run.world.device
    weak = torch.from_numpy(data.events.weak).to(device)
    harvested = None
    if settings.harvested:
        path = Path(settings.harvested).expanduser()
        path = path / "events.parquet" if path.is_dir() else path
        harvested = torch.from_numpy(read_events(path, f"phases.{name}.harvested", data.train, data.shards.classes))

    def losses_of(batch: Batch, progress: float) -> Losses:
        del progress
        parsed = run.engine(batch, parse=True)
        present, given = batch.valid.float(), weak[batch.ids].float()
        each = {"weak": settings.weak_weight * video_losses(parsed["video"], given)}
        if settings.modality_weight:
            smoothing = settings.audio_smoothing, settings.visual_smoothing
            each["modality"] = settings.modality_weight * modality_losses(parsed["modality"], given, smoothing)
        if harvested is not None:
            told = harvested[batch.ids.cpu()].to(device)
            each["segments"] = settings.segment_weight * segment_losses(parsed["segments"], told)
        losses = {key: weighted_mean(value, present) for key, value in each.items()}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    rate = run.settings.optim.lr * settings.lr_scale
    train(run, name, settings.epochs, (rate * settings.tower_lr_scale, rate), losses_of)
