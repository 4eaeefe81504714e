"""Issues that are planted in the embeddings of a small dataset."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.evaluation.embedding import Embeddings
from distav.tools.audit.data_issues import DataIssues, find_data_issues
from distav.tools.audit.issues import neighbors_of
from distav.tools.audit.media_check import MediaCheck
from distav.tools.audit.page import Audit

DUPLICATES = {80: 5, 81: 6, 82: 7}
"""Training clips that are near-duplicates in both modalities, by clip."""
SAME_VIDEO, SAME_AUDIO = (83, 8), (84, 9)
"""Training clips that are near-duplicates in one modality."""
LEAKS = {3: 20, 4: 21, 5: 6}
"""Training clip by the test clip that is a near-duplicate of it; the last one has a duplicate, clip 81."""
OFF_TOPIC = range(90, 96)
SILENT, BLACK, UNREADABLE = 30, 31, 32


def as_embeddings(visual: np.ndarray, audio: np.ndarray) -> Embeddings:
    """Return embeddings of clips that have both modalities."""
    exists = np.ones(len(visual), dtype=bool)
    logits = np.zeros((len(visual), 0), np.float32)
    return Embeddings(
        visual,
        audio,
        visual,
        audio,
        logits=logits,
        visual_logits=logits,
        audio_logits=logits,
        has_visual=exists,
        has_audio=exists,
    )


def class_features(labels: np.ndarray, rng: np.random.Generator, dim: int = 24) -> np.ndarray:
    """Return features that scatter around the center of each class: [n, dim] float32."""
    centers = np.random.default_rng(dim).standard_normal((labels.max() + 1, dim)) * 2
    return (centers[labels] + 0.5 * rng.standard_normal((len(labels), dim))).astype(np.float32)


def planted_issues(root: Path) -> tuple[DataIssues, Audit]:
    """Return the issues of a small dataset with two splits, in which issues are planted, and the page with them."""
    shards, rng = ShardedDataset.open(root), np.random.default_rng(0)
    train, test = shards.split("train"), shards.split("test")
    labels, test_labels = load_labels(shards, train), load_labels(shards, test)
    assert labels.true is not None
    features = [class_features(labels.true, rng) for _ in range(2)]
    test_features = [class_features(test_labels.given, rng) for _ in range(2)]
    for copy, original in [*DUPLICATES.items(), SAME_VIDEO]:
        features[0][copy] = features[0][original] + 0.03 * rng.standard_normal(24)
    for copy, original in [*DUPLICATES.items(), SAME_AUDIO]:
        features[1][copy] = features[1][original] + 0.03 * rng.standard_normal(24)
    for copy, original in LEAKS.items():
        for modality in range(2):
            test_features[modality][copy] = features[modality][original] + 0.03 * rng.standard_normal(24)
    for modality in range(2):
        features[modality][list(OFF_TOPIC)] = 2 * rng.standard_normal((len(OFF_TOPIC), 24))
    self_confidence = np.where(labels.given == labels.true, 0.95, 0.05).astype(np.float32)
    self_confidence[list(OFF_TOPIC)] = 0.2
    names = np.array(labels.classes, dtype=object)
    table = pa.table(
        {
            "key": train.keys.tolist(),
            "given_label": names[labels.given],
            "corrected_label": names[labels.true],
            "knn_label": names[labels.true],
            "self_confidence": self_confidence,
            "correspondence": np.ones(len(train), np.float32),
        }
    )
    rows = [{"id": clip, "silent": clip == SILENT, "black": clip == BLACK} for clip in range(len(train))]
    rows[UNREADABLE] = {"id": UNREADABLE, "undecodable": "no frames"}
    media = MediaCheck.from_rows(rows, len(train))
    embeddings, names_of_test = as_embeddings(*features), [labels.classes[label] for label in test_labels.given]
    data = find_data_issues(train, test, table, names_of_test, embeddings, as_embeddings(*test_features), media)
    neighbors = [neighbors_of(embeddings, train, ranked.ids, 3) for ranked in data.issues]
    correction = {"label_noise_rate_by_class": {}, "label_noise_rate": None, "pair_mismatch_rate": None}
    audit = Audit("planted", train, shards.classes, table, correction, data.issues, neighbors, {}, test, names_of_test)
    return data, audit
