"""Metrics of a trained network on the test split: accuracy and retrieval, or event parsing."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.data.pipeline.loader import Batch
from distav.data.pipeline.sampler import local_batches
from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_
from distav.evaluation.class_metrics import ClassScores, class_counts
from distav.evaluation.event_metrics import event_metrics, predicted_events, segment_accuracy
from distav.evaluation.fusion import Fusion
from distav.evaluation.inference import clip_logits
from distav.evaluation.metrics import retrieval
from distav.training.run import Run

_CLASSIFIERS = ("both", "visual", "audio")
_EVENT_THRESHOLD = 0.5


def evaluate_clips(run: Run, fusion: Fusion | None = None) -> dict[str, Any] | None:
    """Return classification and retrieval metrics on the test split; None without a test split.

    Args:
        run: the run.
        fusion: combines the classifiers for clips with both modalities; None: the joint classifier alone.

    Returns:
        The metrics of `retrieval` over clips with both modalities. If classifiers were trained, also `top1` of the
        modalities that a clip has, and `top1_visual` and `top1_audio` over clips with that modality; the mean recall of
        the classes as `balanced_accuracy`, `balanced_accuracy_visual` and `balanced_accuracy_audio`; and in `by_class`,
        the scores of each class for the classifiers `both`, `visual` and `audio`, see `ClassScores.by_class`.
    """
    split, labels = run.data.test, run.data.test_labels
    if split is None or labels is None:
        return None
    world, num_classes = run.world, len(labels.classes)
    has_classifiers = any(isinstance(phase, SupervisedPhase) for phase in run.config.phases.values())
    targets = torch.from_numpy(labels.given if labels.true is None else labels.true).to(world.device)
    counts = torch.zeros(len(_CLASSIFIERS), 3, num_classes, dtype=torch.float64, device=world.device)
    embeddings: list[tuple[Tensor, Tensor, Tensor]] = []
    batches = local_batches(len(split), run.micro_batch, world.rank, world.world_size)
    with closing(run.iter_outputs(split, batches)) as evaluated_batches:
        for _, batch, outputs in evaluated_batches:
            classes = targets[batch.ids]
            if has_classifiers:
                counts += _batch_counts(batch, outputs, classes, num_classes, fusion)
            paired = batch.paired
            embeddings.append((outputs["visual"][paired], outputs["audio"][paired], classes[paired]))
    all_reduce_sum_(counts)
    metrics = _classification_metrics([ClassScores.of(head) for head in counts], labels.classes)
    visual, audio, classes = (torch.cat(column) for column in zip(*embeddings, strict=True))
    return metrics | retrieval(visual, audio, classes)


def _batch_counts(
    batch: Batch, outputs: dict[str, Tensor], classes: Tensor, num_classes: int, fusion: Fusion | None
) -> Tensor:
    """Return the counts of each classifier in a batch, [3, 3, C]; see `class_counts`."""
    heads = (
        (clip_logits(outputs, batch.present, fusion), batch.valid),
        (outputs["visual_logits"], batch.present["visual"]),
        (outputs["audio_logits"], batch.present["audio"]),
    )
    return torch.stack([class_counts(logits.argmax(1)[rows], classes[rows], num_classes) for logits, rows in heads])


def _classification_metrics(scores: Sequence[ClassScores], classes: list[str]) -> dict[str, Any]:
    """Return the metrics of the classifiers that have test clips; empty if none has."""
    tested = {name: head for name, head in zip(_CLASSIFIERS, scores, strict=True) if sum(head.clips)}
    if not tested:
        return {}
    suffixes = {name: "" if name == "both" else f"_{name}" for name in tested}
    metrics: dict[str, Any] = {f"top1{suffixes[name]}": head.accuracy for name, head in tested.items()}
    metrics |= {f"balanced_accuracy{suffixes[name]}": head.balanced_accuracy for name, head in tested.items()}
    return metrics | {"by_class": {name: head.by_class(classes) for name, head in tested.items()}}


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
