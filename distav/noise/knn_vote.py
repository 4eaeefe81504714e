"""Votes among nearest neighbours, such that no sample's own label ever reaches its own vote.

Legend: N samples, n samples of this rank, t of them at a time, C classes, k neighbours, E feature width.
"""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, all_reduce_sum_, broadcast
from distav.memory.knn import nearest_neighbors
from distav.noise.tiling import in_tiles, tiles

TIE = 1e-6


def pca_whiten(features: Tensor, present: Tensor, width: int, whitening: float) -> Tensor:
    """Turn tower outputs into directions that neighbours can be looked for in.

    The mean over all samples is taken away, the `width` principal axes with most variance are kept, and each is
    divided by its standard deviation to the power `whitening`: 0 leaves the axes as they are, 1 makes all alike.
    In between, the few axes of large variance do not drown what the others know.

    Args:
        features: [n, E] of this rank.
        present: [n] bool, which of them count; the others become zero.
        width: axes kept.
        whitening: 0..1.

    Returns:
        [n, min(width, E)] float32 of unit length.
    """
    num_axes = features.shape[1]

    def centred(some: Tensor, counted: Tensor, mean: Tensor | float) -> Tensor:
        return (some.double() - mean) * counted[:, None]

    cut = [(features[part], present[part]) for part in tiles(len(features), num_axes, features.device)]
    count = all_reduce_sum_(present.sum().double()).clamp_min(1)
    total = torch.zeros(num_axes, dtype=torch.float64, device=features.device)
    for each in cut:
        total += centred(*each, 0.0).sum(0)
    mean = all_reduce_sum_(total) / count
    covariance = total.new_zeros(num_axes, num_axes)
    for each in cut:
        some = centred(*each, mean)
        covariance.addmm_(some.T, some)
    variance, axes = torch.linalg.eigh(all_reduce_sum_(covariance) / count)
    kept = variance.argsort(descending=True)[:width]
    scale = variance[kept].clamp_min(variance.amax() * 1e-10 + 1e-30) ** (-whitening / 2)
    turn: Tensor = broadcast((axes[:, kept] * scale).cpu())  # Signs of axes are free, so all take those of one rank.
    turn = turn.to(features.device)

    def turned(some: Tensor, counted: Tensor) -> Tensor:
        return F.normalize(centred(some, counted, mean) @ turn, dim=1).float()

    return in_tiles(num_axes, turned, features, present)


class NeighborGraph:
    """The nearest neighbours of this rank's samples."""

    def __init__(self, features: Tensor, k: int, groups: Tensor, valid: Tensor):
        """Search for k neighbours; see `nearest_neighbors` for the arguments and errors."""
        ids, self.similarity = nearest_neighbors(features, k, groups, valid)
        self.ids = ids.int()  # Half the memory: with many neighbours and few classes they are the largest table.

    def vote(self, labels: Tensor, num_classes: int, k: int, temperature: float) -> "KnnVote":
        """Let the k nearest vote with their labels.

        Args:
            labels: [N] int64 of all samples.
            num_classes: C.
            k: voters, at most as many as were searched for.
            temperature: divides the similarity; votes are weighted by exp(similarity / temperature).
        """
        return KnnVote(self, labels, num_classes, k, temperature)

    def weights(self, part: slice, k: int, temperature: float) -> Tensor:
        """Return how much the k nearest of some rows weigh: [t, k], 0 where there is none."""
        weights = ((self.similarity[part, :k] - 1) / temperature).exp_()
        return weights.masked_fill_(self.ids[part, :k] < 0, 0.0)


class KnnVote:
    """A vote among neighbours, and second votes over what it elected."""

    def __init__(self, near: NeighborGraph, labels: Tensor, num_classes: int, k: int, temperature: float):
        """Count the votes; made by `Neighborhood.election`."""
        self.near, self.num_classes, self.k, self.temperature = near, num_classes, k, temperature
        self.shares = near.similarity.new_empty(len(near.ids), num_classes)
        """[n, C], rows add up to 1; uniform where a sample has no neighbour."""
        self._total = torch.empty_like(self.shares[:, 0])
        for part in self._tiles():
            weights = near.weights(part, k, temperature)
            self._total[part] = weights.sum(1)
            self.shares[part] = _tally(labels[near.ids[part, :k].clamp_min(0)], weights, num_classes)

    def _tiles(self) -> Iterator[slice]:
        return tiles(len(self.near.ids), max(self.num_classes, self.k), self.near.ids.device)

    def second_round(self, own: Tensor, voters: int) -> Tensor:
        """Vote again, each neighbour with the class that its own neighbours elected.

        Where a sample took part in its neighbour's election, it is first taken out of it. Otherwise its label would
        come back to it by way of its neighbours, and any check of the vote against that label would be flattered.

        Args:
            own: [n] int64 labels of this rank's samples.
            voters: the nearest that vote, at most k.

        Returns:
            [n, C], rows add up to 1.
        """
        first, runner_up, margin, total, reach = self._outcome
        found = torch.empty_like(self.shares)
        for part in self._tiles():
            near, similarity = self.near.ids[part, :voters].clamp_min(0), self.near.similarity[part, :voters]
            share = ((similarity - 1) / self.temperature).exp_() / total[near].clamp_min_(1e-30)
            share.masked_fill_(similarity < reach[near] - TIE, 0.0)
            elected = first[near]
            turned = (elected == own[part, None]) & (margin[near] < share)
            weights = self.near.weights(part, voters, self.temperature)
            found[part] = _tally(torch.where(turned, runner_up[near], elected), weights, self.num_classes)
        return found

    @cached_property
    def _outcome(self) -> tuple[Tensor, ...]:
        """What a second vote has to know of every sample's first, [N] each.

        The classes with most and second most votes, by how much the first leads, the sum of the voters' weights, and
        the similarity of the farthest voter.
        """
        top, order = self.shares.topk(2, dim=1)
        farthest = self.near.similarity[:, self.k - 1].masked_fill(self.near.ids[:, self.k - 1] < 0, -2.0)
        classes = all_gather_variable_rows(order)
        numbers = all_gather_variable_rows(torch.stack([top[:, 0] - top[:, 1], self._total, farthest], dim=1))
        return *classes.unbind(1), *numbers.unbind(1)


def _tally(classes: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    return votes.masked_fill_(votes.sum(1, keepdim=True) <= 0, 1 / num_classes)
