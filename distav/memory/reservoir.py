"""The few hundred scores of each query that pass its bound, and what is largest among them.

A score and an id are packed into one integer, so that one sort orders by score and, where scores are equal, by id.
Legend: b queries, n values of each, k wanted, s slots.
"""

import numpy as np
import torch
from torch import Tensor

NOT_SEEN = torch.iinfo(torch.int64).min
"""What fills the places of neighbours that do not exist; sorts below every score."""

LOWEST = torch.finfo(torch.float32).min
"""Bound that any finite score passes and the -inf of a barred one does not."""


def packed(scores: Tensor, ids: Tensor) -> Tensor:
    """Pack a float32 score and an id into one integer that sorts by score, then by smaller id: [..] int64."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, ~bits ^ torch.iinfo(torch.int32).min, bits).long()
    return (ordered << 32) | (0xFFFFFFFF - ids)


def unpacked_scores(values: Tensor) -> Tensor:
    """Take the scores out of what `packed` made."""
    ordered = (values >> 32).int()
    bits = torch.where(ordered < 0, ~(ordered ^ torch.iinfo(torch.int32).min), ordered)
    return bits.view(torch.float32)


def unpacked_ids(values: Tensor) -> Tensor:
    """Take the ids out of what `packed` made."""
    return 0xFFFFFFFF - (values & 0xFFFFFFFF)


def score_or_lowest(values: Tensor) -> Tensor:
    """Take the scores out of what `packed` made, LOWEST where there is none."""
    return unpacked_scores(values).masked_fill(values == NOT_SEEN, LOWEST)


def nth_largest(values: Tensor, rank: int) -> Tensor:
    """Return the value of a rank in each row, 1 for the largest: [b, n] -> [b]."""
    if values.device.type == "cpu" and values.dtype is not torch.bfloat16:
        at = values.shape[1] - rank
        return torch.from_numpy(np.partition(values.numpy(), at, axis=1)[:, at])
    return values.topk(rank, dim=1, sorted=False).values.amin(1)


def largest_first(values: Tensor, k: int) -> Tensor:
    """Return the k largest of each row in descending order: [b, n] -> [b, k]."""
    if values.device.type == "cpu":
        rows = values.numpy()
        rows.sort(axis=1)
        return torch.from_numpy(rows[:, : -k - 1 : -1].copy())
    return values.topk(k, dim=1).values


class Reservoir:
    """The scores that passed, row by row: [b, s] packed, of which the first `filled` count."""

    def __init__(self, best: Tensor, slots: int):
        self.best = best
        self.held = best.new_empty(len(best), slots)
        self.filled = torch.zeros(len(best), dtype=torch.int64, device=best.device)
        self.row_start = torch.arange(len(best), device=best.device) * slots

    def has_room(self, counts: Tensor) -> bool:
        """Whether so many more values [b] fit."""
        return int((self.filled + counts).max()) <= self.held.shape[1]

    def add(self, row: Tensor, counts: Tensor, values: Tensor) -> None:
        """Append values [p] of the rows [p], which ascend; `counts` [b] says how many each row gets."""
        before = counts.cumsum(0) - counts
        shift = (self.row_start + self.filled - before).index_select(0, row)
        self.held.view(-1).scatter_(0, shift.add_(torch.arange(len(row), device=row.device)), values)
        self.filled += counts

    def nth_largest(self, rank: int) -> Tensor:
        """Return the score of a rank among those held, or a score below all where fewer are: [b, 1]."""
        held = self._used()
        if rank > held.shape[1]:
            return torch.full((len(held), 1), LOWEST, device=held.device)
        return score_or_lowest(nth_largest(held, rank))[:, None]

    def sorted(self) -> Tensor:
        """Return the best k, with those found before: [b, k] in descending order."""
        k = self.best.shape[1]
        both = [self.best, self._used()]
        if both[1].shape[1] >= k and bool((self.best[:, 0] == NOT_SEEN).all()):
            both = both[1:]
        return largest_first(torch.cat(both, dim=1), k)

    def compacted(self) -> Tensor:
        """Keep only the best k; return the score of the last of each row: [b, 1]."""
        self.best = self.sorted()
        self.filled.zero_()
        return score_or_lowest(self.best[:, -1])[:, None]

    def _used(self) -> Tensor:
        width = int(self.filled.max())
        unused = torch.arange(width, device=self.held.device) >= self.filled[:, None]
        return self.held[:, :width].masked_fill(unused, NOT_SEEN)
