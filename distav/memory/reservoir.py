"""The few hundred scores of each query that pass its bound, and what is largest among them.

A score and an id are packed into one integer, so that one sort orders by score and, where scores are equal, by id.
Legend: b queries, n values of each, k wanted, s slots, p values of all queries together.
"""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

EMPTY = torch.iinfo(torch.int64).min
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
    return unpacked_scores(values).masked_fill(values == EMPTY, LOWEST)


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
        if both[1].shape[1] >= k and bool((self.best[:, 0] == EMPTY).all()):
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
        return self.held[:, :width].masked_fill(unused, EMPTY)


MOST_ROWS = 2**15
"""Rows that `Candidates` tells apart in one integer, beside a score of 16 bits and a place of 32."""


def sort_keys(scores: Tensor, places: Tensor) -> Tensor:
    """Pack a 16-bit floating-point score and a place into 48 bits that sort from the largest score, then by place."""
    bits = scores.view(torch.int16).long()
    ordered = torch.where(bits < 0, -0x8000 - bits, bits)
    return ((0x7FFF - ordered) << 32) + places


class Candidates:
    """The rounded scores that passed, of all rows in one list, so that appending takes no synchronization.

    Attributes:
        count: number of scores that `add` appended.
        overflowed: [b] bool, rows of which `append_passing` could not store all.
    """

    def __init__(self, num_rows: int, dtype: torch.dtype, device: torch.device, slots: int = 0):
        """Take the number of rows, at most `MOST_ROWS`, the format of the scores, and slots for `append_passing`."""
        self.count = 0
        self.overflowed = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._dtype = dtype
        self._rows = torch.arange(num_rows, device=device)
        self._sorted = torch.empty(0, dtype=torch.int64, device=device)
        self._new: list[tuple[Tensor, Tensor, Tensor]] = []
        self._slots = torch.arange(slots, device=device)
        self._held = torch.empty(num_rows, slots, dtype=torch.int64, device=device)
        self._filled = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._appended = False

    def add(self, row: Tensor, score: Tensor, place: Tensor) -> None:
        """Append scores [p] of the keys at the places [p] for the rows [p]."""
        self._new.append((row, score, place))
        self.count += len(row)

    def append_passing(self, kernels: ModuleType, scores: Tensor, bound: Tensor, tile: int, num_tiles: int) -> None:
        """Append the scores [b, w] of a tile that reach the bound [b] of their row."""
        kernels.append_passing(scores, bound, self._held, self._filled, tile, num_tiles)
        self._appended = True

    def nth_largest(self, rank: int) -> Tensor:
        """Return the score of a rank in each row, 1 for the largest, or -inf where a row has fewer: [b] float32."""
        values = self._in_order()
        if len(values) < rank:
            return torch.full((len(self._rows),), -torch.inf, device=values.device)
        edges = torch.searchsorted(values, torch.cat([self._rows, self._rows[-1:] + 1]) << 48)
        at = edges[:-1] + (rank - 1)
        ordered = 0x7FFF - ((values[at.clamp_max(len(values) - 1)] >> 32) & 0xFFFF)
        bits = torch.where(ordered < 0, -0x8000 - ordered, ordered).to(torch.int16)
        return bits.view(self._dtype).float().masked_fill(at >= edges[1:], -torch.inf)

    def reaching(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows [p], ascending, and places [p] of the scores that reach the bound [b] of their row."""
        values = self._in_order()
        last = (self._rows << 48) + sort_keys(bound, torch.full_like(self._rows, 0xFFFFFFFF))
        kept = values[values <= last[values >> 48]]
        return kept >> 48, kept & 0xFFFFFFFF

    def clear(self) -> None:
        """Empty the list."""
        self._sorted, self.count = self._sorted[:0], 0

    def _in_order(self) -> Tensor:
        """Sort by row, then by score from the largest, then by place: [p]."""
        parts = [self._sorted]
        if self._new:
            row, score, place = (torch.cat(each) for each in zip(*self._new, strict=True))
            parts.append((row << 48) + sort_keys(score, place))
            self._new.clear()
        if self._appended:
            row, slot = (self._slots < self._filled[:, None]).nonzero(as_tuple=True)
            parts.append((row << 48) + self._held[row, slot])
            self.overflowed |= self._filled > len(self._slots)
            self._filled.zero_()
            self._appended = False
        if len(parts) > 1:
            self._sorted = torch.cat(parts).sort().values
        return self._sorted


def largest_of_rows(values: Tensor, row: Tensor, num_rows: int, k: int) -> Tensor:
    """Return the k largest of each row in descending order out of one list of all rows.

    Args:
        values: [p] int64.
        row: [p] int64, the row of each, below `MOST_ROWS`.
        num_rows: b.
        k: values wanted of each row.

    Returns:
        [b, k], NOT_SEEN where a row has fewer.
    """
    values, order = values.sort(descending=True)
    row, order = row[order].to(torch.int16).sort(stable=True)  # Two bytes take a quarter of the passes of eight.
    row, values = row.long(), values[order]
    start = torch.searchsorted(row, torch.arange(num_rows, device=row.device))
    rank = torch.arange(len(row), device=row.device) - start[row]
    found = values.new_full((num_rows, k + 1), EMPTY)
    found.view(-1).scatter_(0, row * (k + 1) + rank.clamp_max(k), values)  # The last column takes what is too many.
    return found[:, :k]
