"""k-NN, linear probes and linear SVMs on the frozen features of a training split, scored on a test split.

Labels are one class per clip, [n] int64, or several, [n, C] bool. Of a clip with several views, all views train, and
the scores of its views are averaged; with `by_video`, those of all clips of a source video, which then counts once.
Legend: n clips, V views per clip, E feature width, C classes, D width of the projections.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.config.errors import UserError
from distav.console import show_progress
from distav.data.dataset import Split
from distav.distributed.collectives import (
    all_gather_variable_rows,
    broadcast,
    get_rank,
    local_shard,
    shard_range,
)
from distav.evaluation.embedding import Embedder, Embeddings
from distav.evaluation.metrics import class_scores
from distav.evaluation.multi_label_metrics import MultiLabelScores
from distav.evaluation.probing import (
    MAX_FITS,
    LinearProbe,
    LinearSVM,
    MultiLabelProbe,
    MultiLabelSVM,
    knn_class_probs,
    knn_label_probs,
)

PROBES = {"linear_probe": (LinearProbe, MultiLabelProbe), "svm": (LinearSVM, MultiLabelSVM)}
"""Classifiers on frozen features by task: for one label per clip, and for several."""


@dataclass(frozen=True)
class LabeledFeatures:
    """Features of clips, on every rank.

    Attributes:
        features: [n, V, E].
        labels: [n] classes of the clips, or [n, C] bool.
        groups: [n] source videos of the clips.
    """

    features: Tensor
    labels: Tensor
    groups: Tensor

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [n V, E], labels and groups of all views."""
        views = self.features.shape[1]
        labels, groups = (values.repeat_interleave(views, 0) for values in (self.labels, self.groups))
        return self.features.flatten(0, 1), labels, groups


@dataclass(frozen=True)
class EmbeddedSplit:
    """Embeddings of all readable clips of a split, on every rank.

    Attributes:
        features: features by modality, `visual`, `audio` and `both`, of the clips that have it; `both` contains all
            clips, with zeros for a missing modality. A modality that no clip has is left out.
        visual_embedding, audio_embedding: [n, D] unit vectors of the clips with both modalities, means over views.
        paired_classes: [n] their classes, or combinations of classes.
    """

    features: dict[str, LabeledFeatures]
    visual_embedding: Tensor
    audio_embedding: Tensor
    paired_classes: Tensor


def embed_split(
    embedder: Embedder, split: Split, labels: np.ndarray, classes: np.ndarray, views: int = 1
) -> EmbeddedSplit:
    """Embed the clips of a split; each rank computes its part.

    Args:
        embedder: the network.
        split: the clips.
        labels: labels of all clips, [N] or [N, C].
        classes: [N] classes of all clips, or combinations of classes, for retrieval.
        views: V.
    """
    rows = shard_range(len(split))
    embeddings = embedder.embed_views(split, views, np.arange(rows.start, rows.stop))
    device = embedder.device

    def gather(values: np.ndarray) -> Tensor:
        return all_gather_variable_rows(torch.from_numpy(values).to(device))

    def gather_views(name: str) -> Tensor:
        return gather(np.stack([_array(view, name) for view in embeddings], axis=1))

    all_labels, groups = torch.from_numpy(labels).to(device), torch.from_numpy(split.source_codes).to(device)
    has_visual, has_audio = (
        gather(np.all([getattr(view, name) for view in embeddings], axis=0).astype("float32")) > 0
        for name in ("has_visual", "has_audio")
    )
    features = {}
    for name, exists in (("visual", has_visual), ("audio", has_audio), ("both", has_visual | has_audio)):
        gathered = gather_views(name)
        if exists.any():
            features[name] = LabeledFeatures(gathered[exists], all_labels[exists], groups[exists])
    paired = has_visual & has_audio
    visual, audio = (
        torch.nn.functional.normalize(gather_views(f"{name}_embedding")[paired].mean(1), dim=1)
        for name in ("visual", "audio")
    )
    return EmbeddedSplit(features, visual, audio, torch.from_numpy(classes).to(device)[paired])


def _array(embeddings: Embeddings, name: str) -> np.ndarray:
    return embeddings.joint_features() if name == "both" else getattr(embeddings, name)


def classifier_metrics(
    embedder: Embedder, split: Split, labels: np.ndarray, views: int, by_video: bool = False
) -> dict[str, float]:
    """Return the metrics of the classifiers of a network by modality; each rank classifies its part of the clips.

    Args:
        embedder: the network.
        split: the clips.
        labels: labels of all clips, [N] or [N, C].
        views: V; probabilities of the classes are averaged over the views of a clip.
        by_video: whether to average over the clips of a video.
    """
    rows = shard_range(len(split))
    embeddings = embedder.embed_views(split, views, np.arange(rows.start, rows.stop))
    device = embedder.device
    all_labels, groups = torch.from_numpy(labels).to(device), torch.from_numpy(split.source_codes).to(device)
    metrics: dict[str, float] = {}
    for modality, name, mask in (
        ("both", "logits", "valid"), ("visual", "visual_logits", "has_visual"), ("audio", "audio_logits", "has_audio"),
    ):  # fmt: skip
        logits = torch.stack([torch.from_numpy(getattr(view, name)) for view in embeddings], 1).to(device)
        probs = logits.sigmoid() if labels.ndim == 2 else logits.softmax(2)
        exists = np.all([getattr(view, mask) for view in embeddings], axis=0).astype("float32")
        present = all_gather_variable_rows(torch.from_numpy(exists).to(device)) > 0
        clips = LabeledFeatures(all_gather_variable_rows(probs)[present], all_labels[present], groups[present])
        metrics |= modality_metrics(modality, clips.features.mean(1), clips, by_video)
    return metrics


def knn_metrics(
    train: EmbeddedSplit, test: EmbeddedSplit, num_classes: int, k: int, by_video: bool = False
) -> dict[str, float]:
    """Return the metrics of k-NN votes by modality; each rank votes on its part of the test split."""
    queries = {modality: local_shard(test.features[modality].features) for modality in _shared(train, test)}
    votes: dict[str, Tensor] = {}
    with show_progress(sum(local.shape[:2].numel() for local in queries.values()), "clips", "knn") as counter:
        for modality, local in queries.items():
            keys, labels, _ = train.features[modality].flat()
            if labels.ndim == 2:
                local_votes = knn_label_probs(keys, labels, local.flatten(0, 1), k, counter=counter)
            else:
                local_votes = knn_class_probs(keys, labels, local.flatten(0, 1), num_classes, k, counter=counter)
            votes[modality] = all_gather_variable_rows(local_votes.view(*local.shape[:2], num_classes).mean(1))
    return _metrics(votes, test, by_video)


def probe_metrics(
    train: EmbeddedSplit, test: EmbeddedSplit, num_classes: int, task: str, by_video: bool = False
) -> dict[str, float]:
    """Return the metrics of a task of `PROBES` by modality; rank 0 fits the classifiers."""
    if get_rank():
        return broadcast({})
    single, multiple = PROBES[task]
    modalities = _shared(train, test)
    scores: dict[str, Tensor] = {}
    with show_progress(len(modalities) * MAX_FITS, "fits", task) as counter:
        for modality in modalities:
            features, labels, groups = train.features[modality].flat()
            if labels.ndim == 2:
                probe = multiple(features, labels.float(), num_classes, groups, counter)
            else:
                probe = single(features, labels, num_classes, groups, counter)
            queries = test.features[modality].features
            scores[modality] = probe.scores(queries.flatten(0, 1)).view(*queries.shape[:2], num_classes).mean(1)
    return broadcast(_metrics(scores, test, by_video))


def _shared(train: EmbeddedSplit, test: EmbeddedSplit) -> list[str]:
    """Return the modalities that both splits have."""
    return [modality for modality in train.features if modality in test.features]


def _metrics(scores: dict[str, Tensor], test: EmbeddedSplit, by_video: bool) -> dict[str, float]:
    """Return the metrics of scores [n, C] by modality."""
    metrics: dict[str, float] = {}
    for modality, values in scores.items():
        metrics |= modality_metrics(modality, values, test.features[modality], by_video)
    return metrics


def modality_metrics(modality: str, scores: Tensor, clips: LabeledFeatures, by_video: bool) -> dict[str, float]:
    """Return the metrics of scores or probabilities [n, C] of all clips, with the modality added to their names."""
    labels = clips.labels
    if by_video and len(labels):
        scores, labels = _means_of_videos(scores, labels, clips.groups)
    if labels.ndim == 2:
        return MultiLabelScores.of(scores.cpu().numpy(), labels.cpu().numpy()).summary(f"_{modality}")
    return {f"{name}_{modality}": value for name, value in class_scores(scores, labels).items()}


def _means_of_videos(scores: Tensor, labels: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean scores of the clips of each video, and its labels.

    Raises:
        UserError: if the clips of a video have different labels.
    """
    videos, index = groups.unique(return_inverse=True)
    counts = torch.bincount(index, minlength=len(videos))
    first = torch.full_like(videos, len(index)).scatter_reduce(
        0, index, torch.arange(len(index), device=index.device), "amin"
    )
    if not torch.equal(labels[first][index], labels):
        raise UserError("--by-video: clips of one video have different labels; omit the option to score single clips.")
    sums = torch.zeros(len(videos), scores.shape[1], dtype=scores.dtype, device=scores.device)
    return sums.index_add_(0, index, scores) / counts[:, None], labels[first]
