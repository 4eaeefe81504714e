"""Metrics of a trained network on the test split: accuracy and retrieval, or event parsing."""

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.data.pipeline.sampler import local_batches
from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_
from distav.evaluation.event_metrics import event_metrics, predicted_events, segment_accuracy
from distav.evaluation.inference import clip_logits
from distav.evaluation.metrics import retrieval
from distav.training.run import Run

_EVENT_THRESHOLD = 0.5


def evaluate_clips(run: Run) -> dict[str, Any] | None:
    """Return classification and retrieval metrics on the test split; None without a test split.

    Returns:
        The metrics of `retrieval` over clips with both modalities. If classifiers were trained, also `top1` of the
        modalities that a clip has, and `top1_visual` and `top1_audio` over clips with that modality.
    """
    split, labels = run.data.test, run.data.test_labels
    if split is None or labels is None:
        return None
    device, world = run.world.device, run.world
    targets = torch.from_numpy(labels.given if labels.true is None else labels.true).to(device)
    counts = torch.zeros(3, 2, device=device)
    embeddings: list[tuple[Tensor, Tensor, Tensor]] = []
    batches = local_batches(len(split), run.micro_batch, world.rank, world.world_size)
    with closing(run.iter_outputs(split, batches)) as evaluated_batches:
        for _, batch, outputs in evaluated_batches:
            classes = targets[batch.ids]
            counts += torch.stack(
                [
                    _count_correct(clip_logits(outputs, batch.present), classes, batch.valid),
                    _count_correct(outputs["visual_logits"], classes, batch.present["visual"]),
                    _count_correct(outputs["audio_logits"], classes, batch.present["audio"]),
                ]
            )
            paired = batch.paired
            embeddings.append((outputs["visual"][paired], outputs["audio"][paired], classes[paired]))
    totals = zip(("top1", "top1_visual", "top1_audio"), all_reduce_sum_(counts).tolist(), strict=True)
    accuracy = {}
    if any(isinstance(phase, SupervisedPhase) for phase in run.config.phases.values()):
        accuracy = {name: correct / count for name, (correct, count) in totals if count}
    visual, audio, classes = (torch.cat(column) for column in zip(*embeddings, strict=True))
    return accuracy | retrieval(visual, audio, classes)


def _count_correct(logits: Tensor, classes: Tensor, counted: Tensor) -> Tensor:
    """Return the number of clips that are classified correctly, and of all counted clips: [2]."""
    return torch.stack([((logits.argmax(1) == classes) & counted).sum(), counted.sum()]).float()


def evaluate_events(run: Run) -> dict[str, Any] | None:
    """Return event parsing metrics on the test split; None without a test split with annotated events.

    A class is predicted in a segment if its probabilities in the segment and in the clip are 0.5 or more (LLP).

    Returns:
        The metrics of `event_metrics`; with one event per clip also `segment_accuracy` (AVE).
    """
    split, labels, world = run.data.test, run.data.test_events, run.world
    if split is None or labels is None or labels.events is None:
        return None
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    batches = local_batches(len(split), run.micro_batch, world.rank, world.world_size)
    with closing(run.iter_outputs(split, batches, parse=True)) as evaluated_batches:
        for _, batch, outputs in evaluated_batches:
            valid = batch.valid
            segment_probs = outputs["segments"].float().sigmoid()
            parts.append((batch.ids[valid], segment_probs[valid], outputs["video"].float()[valid]))
    ids, segment_probs, video_probs = (
        all_gather_variable_rows(torch.cat(column)).cpu().numpy() for column in zip(*parts, strict=True)
    )
    target = labels.events[ids]
    predicted = (segment_probs >= _EVENT_THRESHOLD) & (video_probs >= _EVENT_THRESHOLD)[:, None, None]
    metrics: dict[str, Any] = {**event_metrics(predicted, target)}
    if not run.data.shards.multi_label:
        target_classes = predicted_events(target[:, 0], target[:, 1])
        predicted_classes = predicted_events(segment_probs[:, 0], segment_probs[:, 1])
        metrics["segment_accuracy"] = segment_accuracy(predicted_classes, target_classes)
    return metrics
