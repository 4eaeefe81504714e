"""Votes among nearest neighbours, such that no sample's own label ever reaches its own vote.

Legend: N samples, n samples of this rank, C classes, k neighbours, E feature width.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Table:
    """What a second vote has to know of every sample's first: [N] each.

    Attributes:
        first, second: the classes with most and second most votes.
        margin: by how much the first leads.
        total: sum of the weights of the voters.
        reach: similarity of the farthest voter.
    """

    first: Tensor
    second: Tensor
    margin: Tensor
    total: Tensor
    reach: Tensor


class Neighborhood:
    """The nearest neighbours of this rank's samples, and votes among them."""

    def __init__(self, features: Tensor, k: int, groups: Tensor, valid: Tensor):
        """Search for k neighbours; see `nearest_neighbors` for the arguments and errors."""
        self.ids, self.similarity = nearest_neighbors(features, k, groups, valid)

    def vote(self, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
        """Return the votes of the k nearest, weighted by exp(similarity / temperature).

        Args:
            labels: [N] int64 of all samples.
            num_classes: C.
            k: voters, at most as many as were searched for.
            temperature: divides the similarity.

        Returns:
            [n, C], rows add up to 1; uniform where a sample has no neighbour.
        """
        weights, _ = self._weights(k, temperature)
        return _tally(labels[self.ids[:, :k].clamp_min(0)], weights, num_classes)

    def second_vote(
        self, own: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float, voters: int
    ) -> Tensor:
        """Vote again, each neighbour with the class that its own neighbours elected.

        Where a sample took part in its neighbour's election, it is first taken out of it. Otherwise its label would
        come back to it by way of its neighbours, and any check of the vote against that label would be flattered.

        Args:
            own: [n] int64 labels of this rank's samples.
            labels: [N] int64 labels of all samples.
            num_classes: C.
            k, temperature: of the first vote.
            voters: of the second vote.

        Returns:
            [n, C], rows add up to 1.
        """
        table = self._table(self.vote(labels, num_classes, k, temperature), k, temperature)
        near, similarity = self.ids[:, :voters].clamp_min(0), self.similarity[:, :voters]
        share = ((similarity - 1) / temperature).exp() / table.total[near].clamp_min(1e-30)
        share = share.masked_fill(similarity < table.reach[near] - TIE, 0.0)
        first = table.first[near]
        turned = (first == own[:, None]) & (table.margin[near] < share)
        weights, _ = self._weights(voters, temperature)
        return _tally(torch.where(turned, table.second[near], first), weights, num_classes)

    def _weights(self, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        weights = ((self.similarity[:, :k] - 1) / temperature).exp().masked_fill(self.ids[:, :k] < 0, 0.0)
        total = weights.sum(1)
        return weights / total.clamp_min(1e-30)[:, None], total

    def _table(self, votes: Tensor, k: int, temperature: float) -> _Table:
        top, order = votes.topk(2, dim=1)
        _, total = self._weights(k, temperature)
        reach = torch.where(self.ids[:, k - 1] < 0, torch.full_like(total, -2.0), self.similarity[:, k - 1])
        classes = gather_ragged_rows(order)
        numbers = gather_ragged_rows(torch.stack([top[:, 0] - top[:, 1], total, reach], dim=1))
        return _Table(classes[:, 0], classes[:, 1], *numbers.unbind(1))


def _tally(classes: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, classes, weights)
    return torch.where(votes.sum(1, keepdim=True) > 0, votes, torch.full_like(votes, 1 / num_classes))
