"""The few hundred scores per query that reach its bound, and the selection of the largest among them.

Legend: b queries, n values per query, k values wanted, s slots per query, p values of all queries together.
"""

import numpy as np
import torch
from torch import Tensor

from distav.memory.packing import EMPTY, LOWEST, score_or_lowest


def nth_largest(values: Tensor, rank: int) -> Tensor:
    """Return the value of a rank in each row, 1 for the largest: [b, n] -> [b]."""
    if values.device.type == "cpu" and values.dtype is not torch.bfloat16:
        index = values.shape[1] - rank
        return torch.from_numpy(np.partition(values.numpy(), index, axis=1)[:, index])
    return values.topk(rank, dim=1, sorted=False).values.amin(1)


def largest_first(values: Tensor, k: int) -> Tensor:
    """Return the k largest values of each row in descending order: [b, n] -> [b, k]. May sort `values` in place."""
    if values.device.type == "cpu":
        rows = values.numpy()
        rows.sort(axis=1)
        return torch.from_numpy(rows[:, : -k - 1 : -1].copy())
    return values.topk(k, dim=1).values


class Reservoir:
    """Packed scores that reached the bound of their query, in s slots per query, beside the k best so far.

    Attributes:
        best: [b, k] packed, in descending order.
    """

    def __init__(self, best: Tensor, slots: int):
        """Start with the k best of other shards and s empty slots per query."""
        self.best = best
        self._stored = best.new_empty(len(best), slots)
        self._num_stored = torch.zeros(len(best), dtype=torch.int64, device=best.device)
        self._row_start = torch.arange(len(best), device=best.device) * slots

    def has_room(self, counts: Tensor) -> bool:
        """Whether `counts` [b] more values fit into the slots of every query."""
        return int((self._num_stored + counts).max()) <= self._stored.shape[1]

    def add(self, row: Tensor, counts: Tensor, values: Tensor) -> None:
        """Append values.

        Args:
            row: [p] query of each value, ascending.
            counts: [b] number of values of each query.
            values: [p] packed.
        """
        preceding = counts.cumsum(0) - counts
        offset = (self._row_start + self._num_stored - preceding).index_select(0, row)
        self._stored.view(-1).scatter_(0, offset.add_(torch.arange(len(row), device=row.device)), values)
        self._num_stored += counts

    def nth_largest(self, rank: int) -> Tensor:
        """Return the stored score of a rank for each query, `LOWEST` where fewer are stored: [b, 1]."""
        stored = self._filled_slots()
        if rank > stored.shape[1]:
            return torch.full((len(stored), 1), LOWEST, device=stored.device)
        return score_or_lowest(nth_largest(stored, rank))[:, None]

    def sorted(self) -> Tensor:
        """Return the k best of the stored values and of `best`: [b, k] in descending order."""
        k = self.best.shape[1]
        stored = self._filled_slots()
        if stored.shape[1] >= k and bool((self.best[:, 0] == EMPTY).all()):
            return largest_first(stored, k)
        return largest_first(torch.cat([self.best, stored], dim=1), k)

    def compact(self) -> Tensor:
        """Keep the k best only and empty the slots; return the k-th best score of each query: [b, 1]."""
        self.best = self.sorted()
        self._num_stored.zero_()
        return score_or_lowest(self.best[:, -1])[:, None]

    def _filled_slots(self) -> Tensor:
        """Return a copy of the filled slots, `EMPTY` where a query has filled fewer than others."""
        width = int(self._num_stored.max())
        unused = torch.arange(width, device=self._stored.device) >= self._num_stored[:, None]
        return self._stored[:, :width].masked_fill(unused, EMPTY)
