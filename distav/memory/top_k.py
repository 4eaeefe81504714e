"""The exact k best keys of each query, for one block of queries and one shard of keys.

A full top-k over all scores takes longer than the scores themselves. Instead, a bound per query, taken from the first
tiles of keys, lets only a few hundred scores of each query pass; these are kept and sorted once. This module searches
with float32 scores, `coarse_top_k` with a first pass in 16 bits.
Legend: b queries, D width, k wanted, T tiles of w keys, p pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.memory.coarse_top_k import coarse_top_k
from distav.memory.key_shard import MIN_GEMM_ROWS, KeyShard, Workspace
from distav.memory.packing import LOWEST, pack, score_or_lowest
from distav.memory.reservoir import Reservoir, nth_largest
from distav.memory.top_k_bound import bound_rank, is_zero_or_power_of_two


def exact_top_k(
    queries: Tensor,
    shard: KeyShard,
    best: Tensor,
    excluded: list[Tensor],
    workspace: Workspace,
    *,
    first: bool,
    estimate_bound: bool,
) -> tuple[Tensor, Tensor]:
    """Merge the best keys of a shard into the best keys found so far.

    The bound of a query is the k-th best score found in other shards. In the first shard, it is set from the tiles
    scanned so far, each time their number doubles. Without estimation it is the k-th largest of their scores, which is
    never too high. The estimated bound is higher, so that fewer scores pass: the k-th largest score of all tiles that
    is expected from this sample, with a margin of four standard deviations. If it was too high, the query ends with
    fewer than k scores above it and has to be searched again without estimation. The result is therefore exact in
    either case.

    With a coarse first pass, every score that comes within its rounding error of the bound is computed again in
    float64 and rounded to float32.

    Args:
        queries: [b, D] float32.
        shard: the keys.
        best: [b, k] packed scores and ids in descending order, `EMPTY` where there are fewer.
        excluded: what `KeyShard.excluded_scores` returned for these queries.
        workspace: buffers of this worker.
        first: whether no shard was searched before.
        estimate_bound: whether the bound may be estimated.

    Returns:
        [b, k] packed, in descending order, and [b] bool, true for queries that have to be searched again.
    """
    search = _float32_top_k if workspace.scores.dtype is torch.float32 else coarse_top_k
    return search(queries, shard, best, excluded, workspace, first, estimate_bound)


def _float32_top_k(
    queries: Tensor,
    shard: KeyShard,
    best: Tensor,
    excluded: list[Tensor],
    workspace: Workspace,
    first: bool,
    estimate_bound: bool,
) -> tuple[Tensor, Tensor]:
    num_queries, k = best.shape
    num_tiles, width = len(shard.tiles), len(shard.tiles[0])
    if num_queries < MIN_GEMM_ROWS:
        queries = torch.cat([queries, queries.new_zeros(MIN_GEMM_ROWS - num_queries, queries.shape[1])])
    bound = score_or_lowest(best[:, -1])[:, None]
    search = _Search(shard, workspace, bound, Reservoir(best, slots=k + width))
    for tile in range(num_tiles):
        scores = shard.scores(queries, tile, excluded[tile], workspace)[:num_queries]
        if first and is_zero_or_power_of_two(tile):
            search.raise_bound(scores, tile, bound_rank(k, (tile or 1) / num_tiles, estimate_bound))
        search.scan_tile(scores, tile)
    best = search.reservoir.sorted()
    return best, score_or_lowest(best[:, -1]) < search.bound.squeeze(1)


@dataclass
class _Search:
    """State of the search of one block of queries in one shard.

    Attributes:
        shard: the keys.
        workspace: buffers of this worker.
        bound: [b, 1] score that a key has to reach.
        reservoir: the scores that reached it.
    """

    shard: KeyShard
    workspace: Workspace
    bound: Tensor
    reservoir: Reservoir

    def raise_bound(self, scores: Tensor, tile: int, rank: int) -> None:
        """Raise the bound to the score of a rank in the tiles scanned so far, or in the first tile [b, w] itself."""
        if tile:
            self.bound = torch.maximum(self.bound, self.reservoir.nth_largest(rank))
        elif rank <= scores.shape[1]:
            self.bound = torch.maximum(self.bound, nth_largest(scores, rank)[:, None])

    def scan_tile(self, scores: Tensor, tile: int) -> None:
        """Keep the scores [b, w] of a tile that reach the bound."""
        self.bound.clamp_min_(LOWEST)
        flat, row, counts = self._passing(scores)
        if not self.reservoir.has_room(counts):
            self.bound = torch.maximum(self.bound, self.reservoir.compact()).clamp_min_(LOWEST)
            flat, row, counts = self._passing(scores)
        key = tile + (flat - row * scores.shape[1]) * len(self.shard.tiles)
        values = pack(scores.view(-1).index_select(0, flat), self.shard.ids.index_select(0, key))
        self.reservoir.add(row, counts, values)

    def _passing(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return flat indices [p] and queries [p] of the scores that reach the bound, and their number per query."""
        passing = self.workspace.passing[: scores.numel()].view(scores.shape)
        if scores.device.type == "cpu":
            # NumPy compares and searches several times as fast as PyTorch on one CPU thread.
            np.greater_equal(scores.numpy(), self.bound.numpy(), out=passing.numpy())
            flat = torch.from_numpy(np.flatnonzero(passing.numpy()))
        else:
            flat = torch.ge(scores, self.bound, out=passing).view(-1).nonzero().squeeze(1)
        row = torch.div(flat, scores.shape[1], rounding_mode="trunc")
        return flat, row, torch.bincount(row, minlength=len(scores))
