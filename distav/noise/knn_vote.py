"""Held-out k-NN votes: the label of a sample never contributes to its own vote.

Legend: N samples, n samples of this rank, t samples of a tile, C classes, k neighbors, E feature width.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_, broadcast, local_shard
from distav.memory.ivf import packed_approximate_neighbors
from distav.memory.knn import packed_neighbors
from distav.memory.packing import unpack_in_place
from distav.noise.probabilities import SMALLEST, normalize_rows
from distav.noise.tiling import map_tiles, tiles

SIMILARITY_TOLERANCE = 1e-6
"""Difference up to which a similarity counts as that of the farthest voter."""
NUM_HALVES = 2
MAX_KEPT_VOTES = 2**20
"""Elements up to which the table of a first round is kept for the second rounds with other numbers of voters."""


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
    """The nearest neighbors of this rank's samples, 8 bytes for each.

    Attributes:
        ids: [n, k] int32; -1 for missing neighbors.
        similarity: [n, k] float32 dot products.
        voter_weights: [N] weights of the samples as voters.
    """

    def __init__(self, features: Tensor, k: int, groups: Tensor, valid: Tensor, num_probes: int | None = None):
        """Search k neighbors. Invalid samples have none.

        Samples of one group may share an error of their label, so a group of several samples has the weight of one.

        Args:
            features, k, groups, valid: see `nearest_neighbors`, also for the errors.
            num_probes: lists to search for each sample, see `approximate_neighbors`; None to search all samples.
        """
        if num_probes is None:
            packed = packed_neighbors(features, k, groups, valid)
        else:
            packed = packed_approximate_neighbors(features, k, groups, valid, num_probes)
        self.ids, self.similarity = unpack_in_place(packed)
        self.ids.masked_fill_(~local_shard(valid)[:, None], -1)
        self.voter_weights = source_weights(groups)
        self._has_equal_weights = bool((self.voter_weights == 1).all())
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
        if not self._has_equal_weights:
            weights *= self.voter_weights[self.ids[part, :k].clamp_min(0)]
        return weights.masked_fill_(self.ids[part, :k] < 0, 0.0)


class KnnVote:
    """A similarity-weighted vote of the nearest neighbors, with an optional second round.

    In the second round, the neighbors vote with the classes that their own first rounds predict. If a sample is a voter
    of its neighbor, its vote is first removed from the neighbor's. Otherwise its label would reach its own vote through
    the neighbors, and the likelihood of that label would be too high.
    """

    def __init__(self, graph: NeighborGraph, labels: Tensor, num_classes: int, k: int, temperature: float):
        """Store the configuration; see `NeighborGraph.vote`."""
        self.graph, self.labels, self.num_classes, self.k, self.temperature = graph, labels, num_classes, k, temperature
        self._kept: tuple[Tensor, Tensor] | None = None

    def of_rows(self, rows: slice | Tensor, voters: int = 0) -> Tensor:
        """Return the votes of some of this rank's samples: [t, C]; rows sum to 1, uniform without neighbors.

        Args:
            rows: row numbers of the samples.
            voters: number of voters of the second round, at most k; 0 for the first round.
        """
        return self._second_round(rows, voters) if voters else self._count_first_round(rows)[0]

    def table(self, voters: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the votes of all samples of this rank: [n, C]; see `of_rows`."""
        similarity = self.graph.similarity
        votes = similarity.new_empty(len(similarity), self.num_classes, dtype=dtype)
        for part in self._tiles():
            votes[part] = self.of_rows(part, voters)
        return votes

    def _tiles(self) -> Iterator[slice]:
        return tiles(len(self.graph.ids), max(self.num_classes, self.k), self.graph.ids.device)

    def _count_first_round(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return the votes [t, C] and the total weights of the voters [t]."""
        if len(self.graph.ids) * self.num_classes > MAX_KEPT_VOTES:
            return self._recount_first_round(rows)
        if self._kept is None:
            self._kept = self._recount_first_round(slice(None))
        return self._kept[0][rows], self._kept[1][rows]

    def _recount_first_round(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        weights = self.graph.vote_weights(rows, self.k, self.temperature)
        classes = self.labels[self.graph.ids[rows, : self.k].clamp_min(0)]
        return _count_votes(classes, weights, self.num_classes), weights.sum(1)

    def _second_round(self, rows: slice | Tensor, k: int) -> Tensor:
        first, runner_up, margin, total_weight, farthest = self._first_round
        own_weights, own_labels = local_shard(self.graph.voter_weights)[rows], local_shard(self.labels)[rows]
        neighbors, similarity = self.graph.ids[rows, :k].clamp_min(0), self.graph.similarity[rows, :k]
        own_vote = ((similarity - 1) / self.temperature).exp_() * own_weights[:, None]
        own_vote /= total_weight[neighbors].clamp_min_(SMALLEST)
        own_vote.masked_fill_(similarity < farthest[neighbors] - SIMILARITY_TOLERANCE, 0.0)
        predicted = first[neighbors]
        depends_on_own = (predicted == own_labels[:, None]) & (margin[neighbors] < own_vote)
        classes = torch.where(depends_on_own, runner_up[neighbors], predicted)
        return _count_votes(classes, self.graph.vote_weights(rows, k, self.temperature), self.num_classes)

    @cached_property
    def _first_round(self) -> tuple[Tensor, ...]:
        """First round of all samples: [N] each.

        The classes with most and second most votes, the difference of their votes, the total weight of the voters, and
        the similarity of the farthest voter.
        """
        similarity, last = self.graph.similarity, self.k - 1
        values = similarity.new_empty(len(similarity), 3)
        classes = torch.empty(len(similarity), 2, dtype=torch.int64, device=similarity.device)
        for part in self._tiles():
            votes, total_weight = self._count_first_round(part)
            top, classes[part] = votes.topk(2, dim=1)
            values[part, 0], values[part, 1] = top[:, 0] - top[:, 1], total_weight
        values[:, 2] = similarity[:, last].masked_fill(self.graph.ids[:, last] < 0, -2.0)
        return *all_gather_variable_rows(classes).unbind(1), *all_gather_variable_rows(values).unbind(1)


def _count_votes(classes: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Return the weighted fractions of the votes for each class: [t, k] twice -> [t, C]; uniform without votes."""
    weights = normalize_rows(weights)
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    return votes.masked_fill_(votes.sum(1, keepdim=True) <= 0, 1 / num_classes)
