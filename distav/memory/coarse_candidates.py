"""Keys whose 16-bit score reaches the bound of a query, the candidates for scoring in full precision.

Legend: b queries, w keys of a tile, k values wanted, p values of all queries together.
"""

from types import ModuleType

import torch
from torch import Tensor

from distav.memory.packing import EMPTY, pack_coarse, unpack_coarse_scores

MAX_QUERIES = 2**15
"""Queries that can be packed into one integer beside a score of 16 bits and a position of 32."""


class Candidates:
    """Coarse scores of all queries in one list, to which scores are appended without synchronization.

    Attributes:
        count: number of scores appended by `add`.
        overflowed: [b] bool, queries for which `append_passing` ran out of slots.
    """

    def __init__(self, num_queries: int, dtype: torch.dtype, device: torch.device, slots: int = 0):
        """Create an empty list.

        Args:
            num_queries: b, at most `MAX_QUERIES`.
            dtype: 16-bit format of the scores.
            device: device of the scores.
            slots: slots per query for `append_passing`.
        """
        self.count = 0
        self.overflowed = torch.zeros(num_queries, dtype=torch.bool, device=device)
        self._dtype = dtype
        self._rows = torch.arange(num_queries, device=device)
        self._sorted = torch.empty(0, dtype=torch.int64, device=device)
        self._added: list[tuple[Tensor, Tensor, Tensor]] = []
        self._slots = torch.arange(slots, device=device)
        self._stored = torch.empty(num_queries, slots, dtype=torch.int64, device=device)
        self._num_passed = torch.zeros(num_queries, dtype=torch.int32, device=device)
        self._has_passing = False

    def add(self, row: Tensor, score: Tensor, position: Tensor) -> None:
        """Append scores [p] of the keys at positions [p] for the queries `row` [p]."""
        self._added.append((row, score, position))
        self.count += len(row)

    def append_passing(self, kernels: ModuleType, scores: Tensor, bound: Tensor, tile: int, num_tiles: int) -> None:
        """Append the scores [b, w] of a tile that reach the bound [b] of their query, with the Triton kernels."""
        kernels.append_passing(scores, bound, self._stored, self._num_passed, tile, num_tiles)
        self._has_passing = True

    def nth_largest(self, rank: int) -> Tensor:
        """Return the score of a rank for each query, 1 for the largest; -inf where it has fewer: [b] float32."""
        values = self._in_order()
        if len(values) < rank:
            return torch.full((len(self._rows),), -torch.inf, device=values.device)
        edges = torch.searchsorted(values, torch.cat([self._rows, self._rows[-1:] + 1]) << 48)
        index = edges[:-1] + (rank - 1)
        scores = unpack_coarse_scores(values[index.clamp_max(len(values) - 1)], self._dtype)
        return scores.float().masked_fill(index >= edges[1:], -torch.inf)

    def reaching(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries [p], ascending, and positions [p] of the scores that reach the bound [b] of their query."""
        values = self._in_order()
        last = (self._rows << 48) + pack_coarse(bound, torch.full_like(self._rows, 0xFFFFFFFF))
        kept = values[values <= last[values >> 48]]
        return kept >> 48, kept & 0xFFFFFFFF

    def clear(self) -> None:
        """Empty the list."""
        self._sorted, self.count = self._sorted[:0], 0

    def _in_order(self) -> Tensor:
        """Return all scores packed and sorted by query, then by descending score, then by position: [p]."""
        parts = [self._sorted]
        if self._added:
            rows, scores, positions = zip(*self._added, strict=True)
            parts.append((torch.cat(rows) << 48) + pack_coarse(torch.cat(scores), torch.cat(positions)))
            self._added.clear()
        if self._has_passing:
            row, slot = (self._slots < self._num_passed[:, None]).nonzero(as_tuple=True)
            parts.append((row << 48) + self._stored[row, slot])
            self.overflowed |= self._num_passed > len(self._slots)
            self._num_passed.zero_()
            self._has_passing = False
        if len(parts) > 1:
            self._sorted = torch.cat(parts).sort().values
        return self._sorted


def largest_per_row(values: Tensor, row: Tensor, num_rows: int, k: int) -> Tensor:
    """Return the k largest values of each row from one list of the values of all rows.

    Args:
        values: [p] int64.
        row: [p] int64 row of each value, below `MAX_QUERIES`.
        num_rows: b.
        k: values wanted per row.

    Returns:
        [b, k] in descending order, `EMPTY` where a row has fewer.
    """
    values, order = values.sort(descending=True)
    row, order = row[order].to(torch.int16).sort(stable=True)  # A sort of two bytes takes a quarter of the passes.
    row, values = row.long(), values[order]
    start = torch.searchsorted(row, torch.arange(num_rows, device=row.device))
    rank = torch.arange(len(row), device=row.device) - start[row]
    largest = values.new_full((num_rows, k + 1), EMPTY)
    largest.view(-1).scatter_(0, row * (k + 1) + rank.clamp_max(k), values)  # The last column takes the surplus.
    return largest[:, :k]
