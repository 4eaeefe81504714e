"""Figures of the clips of a batch, as the network receives them."""

from typing import cast

import torch

from distav.data.pipeline.loader import Batch
from distav.drawing.figures import frame_rows, spectrograms
from distav.models.towers import AudioTower
from distav.training.clip_labels import read_clip_labels
from distav.training.run import Run


def log_inputs(run: Run, batch: Batch) -> None:
    """Log frames, spectrograms and audio of the first clips of a batch with their labels; called by all ranks."""
    count = min(run.config.monitor.media_clips, len(batch.ids))
    if not count or "frames" not in batch.media:
        return
    valid = batch.valid[:count]
    ids = torch.where(valid, batch.ids[:count], 0)  # Ids of rows without a sample are undefined.
    labels = read_clip_labels(run, ids)
    if not run.world.is_main:
        return
    frames, audio = batch.media["frames"][:count], batch.media["audio"][:count]
    captions = [
        [f"clip: {run.data.train.keys[sample]}", *labels.lines(index)] if is_valid else ["could not be read"]
        for index, (sample, is_valid) in enumerate(zip(ids.tolist(), valid.tolist(), strict=True))
    ]
    step, logger = run.progress.total_steps, run.logger
    logger.image("input/frames", frame_rows(frames.cpu().numpy(), captions), step)
    tower = cast(AudioTower, run.engine.model.get_submodule("audio"))
    levels, centers_hz = tower.spectrogram(audio), tower.front_end.mel_centers_hz()
    distance_s = tower.front_end.frame_distance_s()
    if levels is not None and centers_hz is not None and distance_s is not None:
        image = spectrograms(levels.float().cpu().numpy(), centers_hz, distance_s, captions)
        logger.image("input/spectrogram", image, step)
    for number, waveform in enumerate(audio):
        logger.audio(f"input/audio_{number}", waveform, run.data.train.sample_rate_hz, step)
