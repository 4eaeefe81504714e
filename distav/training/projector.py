"""Features of some training clips for TensorBoard's embedding projector.

Legend: n clips, E tower width.
"""

from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.config.phases import EventParsingPhase
from distav.data.pipeline.loader import Batch
from distav.data.pipeline.sampler import padded_batches
from distav.distributed.collectives import all_gather_variable_rows, get_world_size, shard_range
from distav.training.clip_labels import read_clip_labels
from distav.training.run import Run

THUMBNAIL = 64
"""Largest height and width of a thumbnail in pixels."""


def log_projector(run: Run) -> None:
    """Log features, thumbnails and labels of `monitor.projector_clips` random training clips; called by all ranks.

    The features are those of both towers, each normalized to unit length, in evaluation mode; a missing modality is
    zero. Clips are passed through the network once. Datasets of features, and runs that only parse events, have no such
    features, and nothing is logged.
    """
    split, count = run.data.train, min(run.config.monitor.projector_clips, len(run.data.train))
    only_parses = all(isinstance(phase, EventParsingPhase) for phase in run.config.phases.values())
    if not count or split.streams or only_parses:
        return
    selected = np.random.default_rng([run.config.run.seed, 9]).choice(len(split), count, replace=False)
    ids, own, world_size = np.sort(selected), shard_range(count), get_world_size()
    batches = padded_batches(ids[own.start : own.stop], run.micro_batch, -(-count // (world_size * run.micro_batch)))
    parts: list[tuple[Tensor, ...]] = []
    with closing(run.iter_outputs(split, batches)) as evaluated_batches:
        for _, batch, outputs in evaluated_batches:
            rows = batch.valid
            parts.append((batch.ids[rows], _features(batch, outputs)[rows], _thumbnails(batch.media["frames"])[rows]))
    read, features, thumbnails = (all_gather_variable_rows(torch.cat(column)) for column in zip(*parts, strict=True))
    if not len(read):
        return
    labels = read_clip_labels(run, read)
    if not run.logger.tensorboard:
        return
    columns: dict[str, list[str]] = {"clip": split.keys[read.cpu().numpy()].tolist(), "given": labels.given}
    if labels.corrected is not None and labels.confidence is not None:
        columns |= {"corrected": labels.corrected, "confidence": [f"{value:.3f}" for value in labels.confidence]}
    texts = [[" ".join(str(text).split()) for text in row] for row in zip(*columns.values(), strict=True)]
    arrays = features.cpu().numpy(), thumbnails.cpu().numpy()
    run.logger.tensorboard.log_embeddings("clips", arrays[0], list(columns), texts, arrays[1], run.progress.total_steps)


def _features(batch: Batch, outputs: dict[str, Tensor]) -> Tensor:
    """Return the normalized features of both towers: [b, 2 E] float32."""
    return torch.cat(
        [
            F.normalize(outputs[f"{name}_features"].float(), dim=1) * batch.present[name][:, None]
            for name in ("visual", "audio")
        ],
        dim=1,
    )


def _thumbnails(frames: Tensor) -> Tensor:
    """Return the middle frame of each clip: [b, T, H, W, 3] uint8 -> [b, h, w, 3] uint8."""
    images = frames[:, frames.shape[1] // 2].permute(0, 3, 1, 2)
    size = min(THUMBNAIL, images.shape[2]), min(THUMBNAIL, images.shape[3])
    return F.adaptive_avg_pool2d(images.float(), size).round().byte().permute(0, 2, 3, 1)
