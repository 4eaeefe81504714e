"""Votes among nearest neighbours, such that no sample's own label ever reaches its own vote.

Legend: N samples, n samples of this rank, C classes, k neighbours, E feature width.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.neighbors import nearest_neighbors
from distav.world import broadcast, gather_ragged_rows, sum_

TIE = 1e-6


def standardised(features: Tensor, present: Tensor, width: int, whitening: float) -> Tensor:
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
    some = features.double() * present[:, None]
    count = sum_(present.sum().double()).clamp_min(1)
    mean = sum_(some.sum(0)) / count
    centred = (features.double() - mean) * present[:, None]
    variance, axes = torch.linalg.eigh(sum_(centred.T @ centred) / count)
    kept = variance.argsort(descending=True)[:width]
    scale = variance[kept].clamp_min(variance.amax() * 1e-10 + 1e-30) ** (-whitening / 2)
    turn: Tensor = broadcast((axes[:, kept] * scale).cpu())  # Signs of axes are free, so all take those of one rank.
    return F.normalize(centred @ turn.to(centred.device), dim=1).float()


class Neighborhood:
    """The nearest neighbours of this rank's samples."""

    def __init__(self, features: Tensor, k: int, groups: Tensor, valid: Tensor):
        """Search for k neighbours; see `nearest_neighbors` for the arguments and errors."""
        self.ids, self.similarity = nearest_neighbors(features, k, groups, valid)

    def election(self, labels: Tensor, num_classes: int, k: int, temperature: float) -> "Election":
        """Let the k nearest vote with their labels.

        Args:
            labels: [N] int64 of all samples.
            num_classes: C.
            k: voters, at most as many as were searched for.
            temperature: divides the similarity; votes are weighted by exp(similarity / temperature).
        """
        weights = ((self.similarity[:, :k] - 1) / temperature).exp().masked_fill(self.ids[:, :k] < 0, 0.0)
        return Election(self, labels, num_classes, weights, temperature)


class Election:
    """A vote among neighbours, and second votes over what it elected."""

    def __init__(self, near: Neighborhood, labels: Tensor, num_classes: int, weights: Tensor, temperature: float):
        """Count the votes; made by `Neighborhood.election`."""
        self.near, self.num_classes, self.weights, self.temperature = near, num_classes, weights, temperature
        self.shares = _tally(labels[near.ids[:, : weights.shape[1]].clamp_min(0)], weights, num_classes)
        """[n, C], rows add up to 1; uniform where a sample has no neighbour."""

    def second_vote(self, own: Tensor, voters: int) -> Tensor:
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
        near, similarity = self.near.ids[:, :voters].clamp_min(0), self.near.similarity[:, :voters]
        share = ((similarity - 1) / self.temperature).exp() / total[near].clamp_min(1e-30)
        share = share.masked_fill(similarity < reach[near] - TIE, 0.0)
        turned = (first[near] == own[:, None]) & (margin[near] < share)
        return _tally(torch.where(turned, runner_up[near], first[near]), self.weights[:, :voters], self.num_classes)

    @cached_property
    def _outcome(self) -> tuple[Tensor, ...]:
        """What a second vote has to know of every sample's first, [N] each.

        The classes with most and second most votes, by how much the first leads, the sum of the voters' weights, and
        the similarity of the farthest voter.
        """
        top, order = self.shares.topk(2, dim=1)
        last = self.weights.shape[1] - 1
        total, farthest = self.weights.sum(1), self.near.similarity[:, last]
        reach = torch.where(self.near.ids[:, last] < 0, torch.full_like(total, -2.0), farthest)
        classes = gather_ragged_rows(order)
        numbers = gather_ragged_rows(torch.stack([top[:, 0] - top[:, 1], total, reach], dim=1))
        return *classes.unbind(1), *numbers.unbind(1)


def _tally(classes: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    return torch.where(votes.sum(1, keepdim=True) > 0, votes, torch.full_like(votes, 1 / num_classes))
