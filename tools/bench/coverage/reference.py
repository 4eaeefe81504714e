"""Reference classifier with true labels: how much the features of a problem say about the classes.

Legend: Q queries, N samples, T classes, k neighbors.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench.coverage.problem import CoverageData

MAX_QUERIES = 2000
NUM_NEIGHBORS = (5, 15, 40)
VOTE_WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
"""Weights of the votes in a mixture with the class frequencies."""
MIN_INFORMATION = 0.02
"""Fraction of the entropy of the classes below which the features count as uninformative."""
MIN_GAIN = 10.0
"""Log-likelihood gain over the class frequencies, in nats of all queries, below which the same holds."""


@dataclass(frozen=True)
class Reference:
    """Leave-one-out k-NN classification of the true labels in one modality.

    Attributes:
        accuracy: fraction of right classes.
        information: log-likelihood gain over the class frequencies, relative to their entropy.
        gain: the gain in nats of all queries.
    """

    accuracy: float
    information: float
    gain: float

    @property
    def has_signal(self) -> bool:
        """Whether the neighbors know more of the classes than their frequencies do."""
        return self.information > MIN_INFORMATION and self.gain > MIN_GAIN


def classify(features: Tensor, data: CoverageData) -> Reference:
    """Classify samples by the true labels of their neighbors of other sources, with the best k and weight of the votes.

    Args:
        features: [N, E].
        data: true labels and sources.
    """
    _, true = np.unique(data.true, return_inverse=True)
    labels, groups = torch.from_numpy(true), torch.from_numpy(data.groups)
    num_classes = int(labels.max()) + 1
    frequencies = torch.bincount(labels).double() / len(labels)
    queries = torch.arange(0, len(labels), -(-len(labels) // MAX_QUERIES))
    neighbors = _neighbors(features, groups, queries, min(max(NUM_NEIGHBORS), len(labels) - 1))
    prior_log_likelihood = float(frequencies[labels[queries]].log().sum())
    best, accuracy = -np.inf, 0.0
    for k in NUM_NEIGHBORS:
        votes = F.one_hot(labels[neighbors[:, :k]], num_classes).double().mean(1)
        for weight in VOTE_WEIGHTS:
            probs = weight * votes + (1 - weight) * frequencies
            log_likelihood = float(probs.gather(1, labels[queries, None]).log().sum())
            if log_likelihood > best:
                best, accuracy = log_likelihood, float((probs.argmax(1) == labels[queries]).double().mean())
    entropy = -float((frequencies * frequencies.log()).sum())
    gain = best - prior_log_likelihood
    return Reference(accuracy, gain / len(queries) / max(entropy, 1e-9), gain)


def _neighbors(features: Tensor, groups: Tensor, queries: Tensor, k: int) -> Tensor:
    """Return the k samples of other sources that are most similar to each query: [Q, k] int64."""
    normalized = F.normalize(features - features.mean(0), dim=1)
    neighbors = []
    for part in queries.split(256):
        similarity = normalized[part] @ normalized.T
        similarity.masked_fill_(groups[part, None] == groups[None], -2.0)
        neighbors.append(similarity.topk(k, dim=1).indices)
    return torch.cat(neighbors)
