"""How many of the labels that neighbours elect are right, by the number of neighbours, and what likelihood says of it.

The votes are those of the first correction: among pictures, after phase 1, at the middle of its other settings.
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
from distav.noise.calibration import VoteCalibrator
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.label_correction import VoteSearchSpace

NEIGHBORS = (5, 10, 20, 50, 100, 200, 400, 800)
SECOND = 20
TEMPERATURE, WHITENING = 0.2, 0.5


def sweep(run: Path, shards: Path, noises: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Vote on a set's labels under each noise with each number of neighbours.

    Args:
        run: folder of a training of phase 1, with the export.
        shards: the set, with right labels given.
        noises: label noises such as "symmetric:0.8".
        seed: of the flips; those of the benchmark's tables for the same seed.

    Returns:
        For each noise, k, and one vote or two: share of labels right, and log-likelihood of the given labels over
        that of their frequencies, in nats a clip.
    """
    opened = ShardedDataset.open(shards)
    split = opened.split("train")
    labels, num_classes = load_labels(opened, split), len(opened.classes)
    pictures = Embedder.open(run / "export", torch.device("cpu"), batch_size=128).embed_clips(split).visual
    everyone = torch.ones(len(split), dtype=torch.bool)
    directions = pca_whiten(torch.from_numpy(pictures), everyone, VoteSearchSpace().num_components, WHITENING)
    groups = torch.from_numpy(split.source_codes)
    near = NeighborGraph(directions, min(max(NEIGHBORS), len(split) - 1), groups, everyone)
    found = []
    for noise in noises:
        flips = LabelNoise.parse(noise)
        assert flips is not None
        drawn = np.random.default_rng([seed, 7])
        given = torch.from_numpy(flip_labels(labels.given, num_classes, flips, drawn))
        judges = VoteCalibrator(given, num_classes, everyone)
        for k in (each for each in NEIGHBORS if each < len(split)):
            election = near.vote(given, num_classes, k, TEMPERATURE)
            for voters in (each for each in (0, SECOND) if each <= k):
                votes = election.second_round(given, voters) if voters else election.shares
                right = (votes.argmax(1).numpy() == labels.given).mean()
                gain = judges.calibrate(votes, None).per_sample - judges.prior_log_likelihood()
                found.append(
                    {
                        "label_noise": noise,
                        "k": k,
                        "second_round_neighbors": voters,
                        "label_accuracy": 100 * float(right),
                        "log_likelihood_gain": float(gain),
                    }
                )
    return found
