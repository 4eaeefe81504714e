"""Accuracy and log-likelihood of k-NN votes by the number of neighbors.

The votes are visual votes of a first label correction, after phase 1, with its other settings at medium values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.preparation.noise_injection import LabelNoise, flip_labels
from distav.evaluation.embedding import Embedder
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.vote_score import VoteScorer
from distav.noise.vote_search import VoteSearchSpace

NUM_NEIGHBORS = (5, 10, 20, 50, 100, 200, 400, 800)
SECOND_ROUND_NEIGHBORS = 20
TEMPERATURE, WHITENING_POWER = 0.2, 0.5


def sweep(run: Path, shards: Path, noises: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Vote on the labels of a dataset under each label noise with each number of neighbors.

    Args:
        run: directory of a run of phase 1, with its export.
        shards: dataset with correct given labels.
        noises: label noises such as "symmetric:0.8".
        seed: seed of the flips, the same as for the benchmark's tables.

    Returns:
        For each noise, k, and one voting round or two: percentage of correct labels, and the log-likelihood gain over
        the class frequencies in nats per clip.
    """
    dataset = ShardedDataset.open(shards)
    split = dataset.split("train")
    labels, num_classes = load_labels(dataset, split), len(dataset.classes)
    features = Embedder.open(run / "export", torch.device("cpu"), batch_size=128).embed_clips(split).visual
    valid = torch.ones(len(split), dtype=torch.bool)
    num_components = VoteSearchSpace().num_components
    whitened = pca_whiten(torch.from_numpy(features), valid, num_components, WHITENING_POWER)
    groups = torch.from_numpy(split.source_codes)
    graph = NeighborGraph(whitened, min(max(NUM_NEIGHBORS), len(split) - 1), groups, valid)
    rows = []
    for noise in noises:
        label_noise = LabelNoise.parse(noise)
        assert label_noise is not None
        rng = np.random.default_rng([seed, 7])
        given = torch.from_numpy(flip_labels(labels.given, num_classes, label_noise, rng))
        scorer = VoteScorer(given, num_classes, valid)
        frequencies = scorer.class_counts / scorer.num_samples
        baseline = float((frequencies * frequencies.clamp_min(1e-12).log()).sum())
        for k in (k for k in NUM_NEIGHBORS if k < len(split)):
            vote = graph.vote(given, num_classes, k, TEMPERATURE)
            for voters in (voters for voters in (0, SECOND_ROUND_NEIGHBORS) if voters <= k):
                votes = vote.table(voters)
                accuracy = (votes.argmax(1).numpy() == labels.given).mean()
                gain = scorer.score(votes) - baseline
                row = {"label_noise": noise, "k": k, "second_round_neighbors": voters}
                rows.append(row | {"label_accuracy": 100 * float(accuracy), "log_likelihood_gain": gain})
    return rows
