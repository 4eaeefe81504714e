"""Metrics of a trained network on the test split of a multi-label dataset."""

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distav.config.phases import SupervisedPhase
from distav.data.pipeline.sampler import local_batches
from distav.distributed.collectives import all_gather_variable_rows
from distav.evaluation.inference import clip_logits
from distav.evaluation.metrics import retrieval
from distav.evaluation.multi_label_metrics import MultiLabelScores
from distav.training.run import Run

_CLASSIFIERS = {"both": "", "visual": "_visual", "audio": "_audio"}
"""Classifiers, and the ends of the names of their metrics."""


def evaluate_multi_label_clips(run: Run) -> dict[str, Any] | None:
    """Return classification and retrieval metrics on the test split; None without a test split.

    Returns:
        The metrics of `retrieval` over clips with both modalities, where clips with the same set of classes are
        relevant. If classifiers were trained, also the scores of `MultiLabelScores` for the modalities that a clip has,
        and with the endings `_visual` and `_audio` over clips with that modality; `chance`, the mAP of random scores;
        and in `by_class` the scores of each class for the classifiers `both`, `visual` and `audio`.
    """
    split, labels, combinations = run.data.test, run.data.test_multi_labels, run.data.test_labels
    if split is None or labels is None or combinations is None:
        return None
    world = run.world
    has_classifiers = any(isinstance(phase, SupervisedPhase) for phase in run.config.phases.values())
    combination = torch.from_numpy(combinations.given).to(world.device)
    probs: dict[str, list[Tensor]] = {name: [] for name in _CLASSIFIERS}
    ids: dict[str, list[Tensor]] = {name: [] for name in _CLASSIFIERS}
    embeddings: list[tuple[Tensor, Tensor, Tensor]] = []
    batches = local_batches(len(split), run.micro_batch, world.rank, world.world_size)
    with closing(run.iter_outputs(split, batches)) as evaluated_batches:
        for _, batch, outputs in evaluated_batches:
            heads = {
                "both": (clip_logits(outputs, batch.present), batch.valid),
                "visual": (outputs["visual_logits"], batch.present["visual"]),
                "audio": (outputs["audio_logits"], batch.present["audio"]),
            }
            for name, (logits, rows) in heads.items():
                probs[name].append(logits.float().sigmoid()[rows])
                ids[name].append(batch.ids[rows])
            paired = batch.paired
            embeddings.append((outputs["visual"][paired], outputs["audio"][paired], combination[batch.ids][paired]))
    metrics: dict[str, Any] = {}
    if has_classifiers:
        gathered = {name: (_gather(probs[name]), labels.reference[_gather(ids[name])]) for name in _CLASSIFIERS}
        metrics = classification_metrics(gathered, labels.classes)
    visual, audio, classes = (torch.cat(column) for column in zip(*embeddings, strict=True))
    return metrics | retrieval(visual, audio, classes)


def _gather(parts: list[Tensor]) -> np.ndarray:
    return all_gather_variable_rows(torch.cat(parts)).cpu().numpy()


def classification_metrics(predictions: dict[str, tuple[np.ndarray, np.ndarray]], classes: list[str]) -> dict[str, Any]:
    """Return the metrics of the classifiers that have test clips; empty if none has.

    Args:
        predictions: probabilities [n, C] and labels [n, C] bool by classifier.
        classes: C names.
    """
    scores = {name: MultiLabelScores.of(*tables) for name, tables in predictions.items() if len(tables[0])}
    if not scores:
        return {}
    metrics: dict[str, Any] = {}
    for name, head in scores.items():
        metrics |= head.summary(_CLASSIFIERS[name])
    if "both" in scores:
        metrics["chance"] = scores["both"].chance
    return metrics | {"by_class": {name: head.by_class(classes) for name, head in scores.items()}}
