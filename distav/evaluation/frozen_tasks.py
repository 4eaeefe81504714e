"""k-NN and linear probes on the frozen features of a training split, scored on a test split.

Labels are one class per clip, [n] int64, or several, [n, C] bool.
Legend: n clips, E feature width, C classes, D width of the projections.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.data.dataset import Split
from distav.distributed.collectives import (
    all_gather_variable_rows,
    all_reduce_sum_,
    broadcast,
    get_rank,
    local_shard,
    shard_range,
)
from distav.evaluation.class_metrics import ClassScores, class_counts
from distav.evaluation.embedding import Embedder
from distav.evaluation.multi_label_metrics import MultiLabelScores
from distav.evaluation.probing import LinearProbe, MultiLabelProbe, knn_class_probs, knn_label_probs


@dataclass(frozen=True)
class LabeledFeatures:
    """Features of clips, on every rank.

    Attributes:
        features: [n, E].
        labels: [n] classes of the clips, or [n, C] bool.
        groups: [n] source videos of the clips.
    """

    features: Tensor
    labels: Tensor
    groups: Tensor


@dataclass(frozen=True)
class EmbeddedSplit:
    """Embeddings of all readable clips of a split, on every rank.

    Attributes:
        features: features by modality, `visual`, `audio` and `both`, of the clips that have it; `both` contains all
            clips, with zeros for a missing modality. A modality that no clip has is left out.
        visual_embedding, audio_embedding: [n, D] unit vectors of the clips with both modalities.
        paired_classes: [n] their classes, or combinations of classes.
    """

    features: dict[str, LabeledFeatures]
    visual_embedding: Tensor
    audio_embedding: Tensor
    paired_classes: Tensor


def embed_split(embedder: Embedder, split: Split, labels: np.ndarray, classes: np.ndarray) -> EmbeddedSplit:
    """Embed the clips of a split; each rank computes its part.

    Args:
        embedder: the network.
        split: the clips.
        labels: labels of all clips, [N] or [N, C].
        classes: [N] classes of all clips, or combinations of classes, for retrieval.
    """
    rows = shard_range(len(split))
    embeddings = embedder.embed_clips(split, np.arange(rows.start, rows.stop))
    device = embedder.device

    def gather(values: np.ndarray) -> Tensor:
        return all_gather_variable_rows(torch.from_numpy(values).to(device))

    all_labels, groups = torch.from_numpy(labels).to(device), torch.from_numpy(split.source_codes).to(device)
    has_visual, has_audio = (
        gather(mask.astype("float32")) > 0 for mask in (embeddings.has_visual, embeddings.has_audio)
    )
    features = {}
    for name, values, exists in (
        ("visual", embeddings.visual, has_visual),
        ("audio", embeddings.audio, has_audio),
        ("both", embeddings.joint_features(), has_visual | has_audio),
    ):
        gathered = gather(values)
        if exists.any():
            features[name] = LabeledFeatures(gathered[exists], all_labels[exists], groups[exists])
    paired = has_visual & has_audio
    return EmbeddedSplit(
        features,
        gather(embeddings.visual_embedding)[paired],
        gather(embeddings.audio_embedding)[paired],
        torch.from_numpy(classes).to(device)[paired],
    )


def knn_metrics(train: EmbeddedSplit, test: EmbeddedSplit, num_classes: int, k: int) -> dict[str, float]:
    """Return the metrics of k-NN votes by modality; each rank votes on its part of the test split."""
    metrics: dict[str, float] = {}
    for modality, keys in train.features.items():
        if queries := test.features.get(modality):
            local_features, local_labels = local_shard(queries.features), local_shard(queries.labels)
            if keys.labels.ndim == 2:
                votes = knn_label_probs(keys.features, keys.labels, local_features, k)
                metrics |= _list_scores(modality, all_gather_variable_rows(votes), queries.labels)
                continue
            votes = knn_class_probs(keys.features, keys.labels, local_features, num_classes, k)
            counts = class_counts(votes.argmax(1), local_labels, num_classes)
            metrics |= _class_scores(modality, all_reduce_sum_(counts))
    return metrics


def probe_metrics(train: EmbeddedSplit, test: EmbeddedSplit, num_classes: int) -> dict[str, float]:
    """Return the metrics of linear probes by modality; rank 0 fits them."""
    metrics: dict[str, float] = {}
    if get_rank() == 0:
        for modality, clips in train.features.items():
            if queries := test.features.get(modality):
                if clips.labels.ndim == 2:
                    probe = MultiLabelProbe(clips.features, clips.labels.float(), num_classes, clips.groups)
                    metrics |= _list_scores(modality, probe(queries.features).sigmoid(), queries.labels)
                    continue
                probe = LinearProbe(clips.features, clips.labels, num_classes, clips.groups)
                counts = class_counts(probe(queries.features).argmax(1), queries.labels, num_classes)
                metrics |= _class_scores(modality, counts)
    return broadcast(metrics)


def _class_scores(modality: str, counts: Tensor) -> dict[str, float]:
    """Return accuracy and balanced accuracy for the counts of `class_counts`."""
    scores = ClassScores.of(counts)
    return {modality: scores.accuracy, f"balanced_{modality}": scores.balanced_accuracy}


def _list_scores(modality: str, probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Return mAP, F1 and d-prime for probabilities and labels of all clips, [n, C]."""
    return MultiLabelScores.of(probs.cpu().numpy(), labels.cpu().numpy()).summary(f"_{modality}")
