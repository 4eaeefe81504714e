"""Held-out k-NN votes: the label of a sample never contributes to its own vote.

Legend: N samples, n samples of this rank, t samples of a tile, C classes, k neighbors, E feature width.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_, broadcast, local_shard
from distav.memory.knn import nearest_neighbors
from distav.noise.probabilities import SMALLEST, normalize_rows
from distav.noise.tiling import map_tiles, tiles

SIMILARITY_TOLERANCE = 1e-6
"""Difference up to which a similarity counts as that of the farthest voter."""
NUM_HALVES = 2


def pca_whiten(features: Tensor, present: Tensor, num_components: int, power: float) -> Tensor:
    """Project features onto their principal components, whiten and normalize them for a neighbor search.

    The features are centered and projected onto the components of largest variance. Each component is divided by its
    standard deviation to the given power: 0 keeps the variances, 1 equalizes them. In between, a few components of
    large variance do not dominate the similarity.

    Args:
        features: [n, E] of this rank.
        present: [n] bool, samples with features; the other rows become zero.
        num_components: components kept.
        power: whitening power, 0..1.

    Returns:
        [n, min(num_components, E)] float32 of unit length.
    """
    feature_width = features.shape[1]

    def centered(rows: Tensor, mask: Tensor, mean: Tensor | float) -> Tensor:
        return (rows.double() - mean) * mask[:, None]

    parts = [(features[part], present[part]) for part in tiles(len(features), feature_width, features.device)]
    count = all_reduce_sum_(present.sum().double()).clamp_min(1)
    total = torch.zeros(feature_width, dtype=torch.float64, device=features.device)
    for rows, mask in parts:
        total += centered(rows, mask, 0.0).sum(0)
    mean = all_reduce_sum_(total) / count
    covariance = total.new_zeros(feature_width, feature_width)
    for rows, mask in parts:
        difference = centered(rows, mask, mean)
        covariance.addmm_(difference.T, difference)
    variance, axes = torch.linalg.eigh(all_reduce_sum_(covariance) / count)
    kept = variance.argsort(descending=True)[:num_components]
    scale = variance[kept].clamp_min(variance.amax() * 1e-10 + 1e-30) ** (-power / 2)
    # The signs of eigenvectors are arbitrary, so all ranks use those of one rank.
    projection: Tensor = broadcast((axes[:, kept] * scale).cpu())
    projection = projection.to(features.device)

    def project(rows: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(centered(rows, mask, mean) @ projection, dim=1).float()

    return map_tiles(feature_width, project, features, present)


def source_weights(groups: Tensor) -> Tensor:
    """Return the reciprocal of the number of samples in the group of each sample: [N] -> [N] float32."""
    _, inverse, counts = groups.unique(return_inverse=True, return_counts=True)
    return 1 / counts.float()[inverse]


def source_halves(groups: Tensor) -> Tensor:
    """Divide the samples into two halves at random; those of one group are in the same: [N] -> [N] uint8."""
    unique, inverse = groups.unique(return_inverse=True)
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(0))
    return (order % NUM_HALVES).to(groups.device, torch.uint8)[inverse]


class NeighborGraph:
    """The nearest neighbors of this rank's samples."""

    def __init__(self, features: Tensor, k: int, groups: Tensor, valid: Tensor):
        """Search k neighbors; see `nearest_neighbors` for the arguments and errors. Invalid samples have none.

        Samples of one group may share an error of their label, so a group of several samples has the weight of one.
        """
        ids, self.similarity = nearest_neighbors(features, k, groups, valid)
        self.ids = ids.int()  # int32: with many neighbors and few classes this is the largest table.
        self.ids.masked_fill_(~local_shard(valid)[:, None], -1)
        self.voter_weights = source_weights(groups)
        self._half_of_voter = source_halves(groups)

    def vote(self, labels: Tensor, num_classes: int, k: int, temperature: float) -> "KnnVote":
        """Return the vote of the k nearest neighbors with their labels.

        Args:
            labels: [N] int64 of all samples.
            num_classes: C.
            k: number of voters, at most the k of the graph.
            temperature: votes are weighted by exp(similarity / temperature).
        """
        return KnnVote(self, labels, num_classes, k, temperature)

    def half_votes(self, rows: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> list[Tensor]:
        """Return the votes of the voters of either half of the sources, see `source_halves`: [t, C] each.

        Args:
            rows: [t] row numbers of the samples that are voted for.
            labels, num_classes, k, temperature: see `vote`.
        """
        ids, weights = self.ids[rows, :k].clamp_min(0), self.vote_weights(rows, k, temperature)
        halves = self._half_of_voter[ids]
        return [_count_votes(labels[ids], weights * (halves == half), num_classes) for half in range(NUM_HALVES)]

    def vote_weights(self, part: slice | Tensor, k: int, temperature: float) -> Tensor:
        """Return the weights of the k nearest neighbors of some rows: [t, k]; 0 for missing neighbors."""
        weights = ((self.similarity[part, :k] - 1) / temperature).exp_()
        weights *= self.voter_weights[self.ids[part, :k].clamp_min(0)]
        return weights.masked_fill_(self.ids[part, :k] < 0, 0.0)


class KnnVote:
    """A similarity-weighted vote of the nearest neighbors, with an optional second round.

    Attributes:
        probs: [n, C] votes of the first round; rows sum to 1, and are uniform for samples without neighbors.
    """

    def __init__(self, graph: NeighborGraph, labels: Tensor, num_classes: int, k: int, temperature: float):
        """Count the first round; see `NeighborGraph.vote`."""
        self.graph, self.num_classes, self.k, self.temperature = graph, num_classes, k, temperature
        self.probs = graph.similarity.new_empty(len(graph.ids), num_classes)
        self._total_weight = torch.empty_like(self.probs[:, 0])
        for part in self._tiles():
            weights = graph.vote_weights(part, k, temperature)
            self._total_weight[part] = weights.sum(1)
            self.probs[part] = _count_votes(labels[graph.ids[part, :k].clamp_min(0)], weights, num_classes)

    def _tiles(self) -> Iterator[slice]:
        return tiles(len(self.graph.ids), max(self.num_classes, self.k), self.graph.ids.device)

    def second_round(self, labels: Tensor, k: int) -> Tensor:
        """Return the vote of the nearest neighbors with the classes that their own first rounds predict.

        If a sample is a voter of its neighbor, its vote is first removed from the neighbor's. Otherwise its label would
        reach its own vote through the neighbors, and the likelihood of that label would be too high.

        Args:
            labels: [n] int64 labels of this rank's samples.
            k: number of voters, at most the k of the first round.

        Returns:
            [n, C], rows sum to 1.
        """
        first, runner_up, margin, total_weight, farthest = self._first_round
        votes, own_weights = torch.empty_like(self.probs), local_shard(self.graph.voter_weights)
        for part in self._tiles():
            neighbors, similarity = self.graph.ids[part, :k].clamp_min(0), self.graph.similarity[part, :k]
            own_vote = ((similarity - 1) / self.temperature).exp_() * own_weights[part, None]
            own_vote /= total_weight[neighbors].clamp_min_(SMALLEST)
            own_vote.masked_fill_(similarity < farthest[neighbors] - SIMILARITY_TOLERANCE, 0.0)
            predicted = first[neighbors]
            depends_on_own = (predicted == labels[part, None]) & (margin[neighbors] < own_vote)
            classes = torch.where(depends_on_own, runner_up[neighbors], predicted)
            weights = self.graph.vote_weights(part, k, self.temperature)
            votes[part] = _count_votes(classes, weights, self.num_classes)
        return votes

    @cached_property
    def _first_round(self) -> tuple[Tensor, ...]:
        """First round of all samples: [N] each.

        The classes with most and second most votes, the difference of their votes, the total weight of the voters, and
        the similarity of the farthest voter.
        """
        top, classes = self.probs.topk(2, dim=1)
        last = self.k - 1
        farthest = self.graph.similarity[:, last].masked_fill(self.graph.ids[:, last] < 0, -2.0)
        values = torch.stack([top[:, 0] - top[:, 1], self._total_weight, farthest], dim=1)
        return *all_gather_variable_rows(classes).unbind(1), *all_gather_variable_rows(values).unbind(1)


def _count_votes(classes: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Return the weighted fractions of the votes for each class: [t, k] twice -> [t, C]; uniform without votes."""
    weights = normalize_rows(weights)
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    return votes.masked_fill_(votes.sum(1, keepdim=True) <= 0, 1 / num_classes)
