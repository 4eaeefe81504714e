"""Exact top-k search with a first pass in 16 bits.

The bound of a query is lowered by the largest possible rounding error of a 16-bit score, and the keys that pass it
are scored again in float64. Large tiles keep the time of the operators small beside the products: an H100 multiplies
a tile of 4,096 queries and 65,536 keys in about 300 microseconds and launches an operator in 5.
Legend: b queries, m valid keys, D width, k wanted, T tiles of w keys, p pairs.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from distav.memory.coarse_candidates import Candidates, largest_per_row
from distav.memory.key_shard import GROUP_SIZE, KeyShard, Workspace
from distav.memory.packing import pack, score_or_lowest
from distav.memory.reservoir import largest_first, nth_largest
from distav.memory.top_k_bound import bound_rank, is_zero_or_power_of_two

log = logging.getLogger("distav")

MAX_CANDIDATES = 2**24
"""Candidates of a block of queries that are kept before they are scored in full precision."""

MIN_SLOTS = 1024
"""Smallest number of candidates per query that the kernels can store; a query with more is searched again without."""

_DOT_PRODUCT_NUMBERS = 2**24
"""Numbers that `dot_products` multiplies at a time."""


def coarse_top_k(
    queries: Tensor,
    shard: KeyShard,
    best: Tensor,
    excluded: list[Tensor],
    workspace: Workspace,
    first: bool,
    estimate_bound: bool,
) -> tuple[Tensor, Tensor]:
    """Merge the best keys of a shard into the best keys found so far; see `exact_top_k`."""
    k, num_tiles = best.shape[1], len(shard.tiles)
    search = _CoarseSearch.start(queries, shard, best, workspace.scores.dtype, first, use_kernels=estimate_bound)
    for tile in range(num_tiles):
        scores = shard.scores(search.rounded, tile, excluded[tile], workspace)
        if first and tile != 1 and is_zero_or_power_of_two(tile):
            rank = bound_rank(k, (tile or 1) / num_tiles, estimate_bound)
            search.raise_bound(search.candidates.nth_largest(rank) if tile else _nth_largest_of_groups(scores, rank))
        search.scan_tile(scores, tile)
    search.rescore_candidates()
    return search.best, (search.best_score() < search.reached) | search.candidates.overflowed


@dataclass
class _CoarseSearch:
    """State of the search of one block of queries in one shard. Scores are of scaled queries and keys.

    Attributes:
        queries: [b, D] float32, not scaled.
        shard: the keys.
        rounded: [b, D] scaled queries in the 16-bit format.
        error: [b] upper bound of the error of a coarse score before it is rounded itself.
        reached: [b] float32 score that k keys are known, or expected, to reach.
        bound: [b] lowest coarse score of a key whose score may be `reached`, in the 16-bit format.
        candidates: keys whose coarse scores reached the bound.
        best: [b, k] packed, best keys in full precision.
        best_is_empty: whether no keys have been scored in full precision yet.
        kernels: Triton kernels; None to use PyTorch operators.
    """

    queries: Tensor
    shard: KeyShard
    rounded: Tensor
    error: Tensor
    reached: Tensor
    bound: Tensor
    candidates: Candidates
    best: Tensor
    best_is_empty: bool
    kernels: ModuleType | None

    @staticmethod
    def start(
        queries: Tensor, shard: KeyShard, best: Tensor, dtype: torch.dtype, first: bool, *, use_kernels: bool
    ) -> "_CoarseSearch":
        """Round the queries and set the bound to the k-th best score of other shards."""
        num_queries, k = best.shape
        scaled = queries * shard.scale
        rounded = scaled.to(dtype)
        kernels = kernels_for(queries.device, queries.shape[1]) if use_kernels else None
        search = _CoarseSearch(
            queries=queries,
            shard=shard,
            rounded=rounded,
            error=_rounding_error(scaled, rounded, shard),
            reached=score_or_lowest(best[:, -1]) * shard.scale**2,
            bound=torch.empty(num_queries, dtype=dtype, device=queries.device),
            candidates=Candidates(num_queries, dtype, queries.device, slots=max(MIN_SLOTS, 4 * k) if kernels else 0),
            best=best,
            best_is_empty=first,
            kernels=kernels,
        )
        search.update_bound()
        return search

    def best_score(self) -> Tensor:
        """Return the k-th best scaled score in full precision: [b]."""
        return score_or_lowest(self.best[:, -1]) * self.shard.scale**2

    def raise_bound(self, scores: Tensor) -> None:
        """Raise the bound from coarse scores [b] that k keys of each query reach; -inf where unknown."""
        error = self.error + scores.abs() * (torch.finfo(self.bound.dtype).eps / 2)
        torch.maximum(self.reached, scores - error, out=self.reached)
        self.update_bound()

    def update_bound(self) -> None:
        """Set the bound to `reached` minus the error of a coarse score."""
        self.bound.copy_((self.reached - self.error).clamp_min_(torch.finfo(self.bound.dtype).min))

    def scan_tile(self, scores: Tensor, tile: int) -> None:
        """Keep the keys whose coarse scores [b, w] reach the bound."""
        num_tiles = len(self.shard.tiles)
        if self.kernels:
            self.candidates.append_passing(self.kernels, scores, self.bound, tile, num_tiles)
            return
        for row, column, score in _passing(scores, self.bound):
            self.candidates.add(row, score, column * num_tiles + tile)
            if self.candidates.count > MAX_CANDIDATES:
                self.rescore_candidates()
                torch.maximum(self.reached, self.best_score(), out=self.reached)
                self.update_bound()

    def rescore_candidates(self) -> None:
        """Score the candidates that reach the bound in full precision, merge them into `best` and clear the list."""
        self.raise_bound(self.candidates.nth_largest(self.best.shape[1]))
        row, key = self.candidates.reaching(self.bound)
        self.candidates.clear()
        num_queries, k = self.best.shape
        values = pack(dot_products(self.queries, self.shard.keys, row, key), self.shard.ids[key])
        largest = largest_per_row(values, row, num_queries, k)
        self.best = largest if self.best_is_empty else largest_first(torch.cat([self.best, largest], dim=1), k)
        self.best_is_empty = False


def _rounding_error(scaled: Tensor, rounded: Tensor, shard: KeyShard) -> Tensor:
    """Return an upper bound of the error of a coarse score before it is rounded itself: [b].

    |q.k - q'.k'| <= |q - q'| |k| + |q'| |k - k'| for the rounded q' and k', and the error of a float32 sum of D terms.
    The norms of the rounding errors are measured; they are 0.4 of the largest possible ones on average.
    """
    limits = torch.finfo(rounded.dtype)
    query_residual, query_norm = (scaled - rounded).norm(dim=1), rounded.float().norm(dim=1)
    summation = (scaled.shape[1] + 2) * 2.0**-23 * shard.max_norm * scaled.norm(dim=1)
    products = query_residual * shard.max_norm + query_norm * shard.residual
    return 1.01 * (products + summation) + limits.smallest_normal * limits.eps


def _nth_largest_of_groups(scores: Tensor, rank: int) -> Tensor:
    """Return a coarse score that `rank` keys of each query reach, close to the largest one: [b, w] -> [b] float32."""
    maxima = scores.view(len(scores), GROUP_SIZE, -1).amax(1)
    if 2 * rank <= maxima.shape[1]:  # Few of the largest scores share a group.
        return nth_largest(maxima, rank).float()
    if rank <= scores.shape[1]:
        return nth_largest(scores, rank).float()
    return torch.full((len(scores),), -torch.inf, device=scores.device)


def _passing(scores: Tensor, bound: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows, columns and values [p] of the scores [b, w] that reach the bound [b] of their row, in parts.

    The bound may be raised in place between parts.
    """
    grouped = scores.view(len(scores), GROUP_SIZE, -1)
    rows, groups = (grouped.amax(1) >= bound[:, None]).nonzero(as_tuple=True)
    part_size = max(1, MAX_CANDIDATES // GROUP_SIZE)
    for row, group in zip(rows.split(part_size), groups.split(part_size), strict=True):
        members = grouped[row, :, group]
        index, member = (members >= bound[row][:, None]).nonzero(as_tuple=True)
        yield row[index], torch.add(group[index], member, alpha=grouped.shape[2]), members[index, member]


def dot_products(queries: Tensor, keys: Tensor, row: Tensor, key: Tensor) -> Tensor:
    """Return the dot products of queries[row] and keys[key], computed in float64 and rounded to float32: [p].

    The terms are summed by folding the vector in halves, an order that does not depend on the device or the number of
    pairs.
    """
    width = queries.shape[1]
    kernels = kernels_for(queries.device, width)
    products = queries.new_empty(len(row))
    part_size = max(1, _DOT_PRODUCT_NUMBERS // width)
    for start in range(0, len(row), part_size):
        part = slice(start, start + part_size)
        if kernels:
            terms = kernels.folded_products(queries, keys, row[part], key[part])
        else:
            terms = queries[row[part]].double().mul_(keys[key[part]])
        while terms.shape[1] > 1:
            half, odd = divmod(terms.shape[1], 2)
            folded = terms[:, :half] + terms[:, half : 2 * half]
            terms = torch.cat([folded, terms[:, -1:]], dim=1) if odd else folded
        products[part] = terms.squeeze(1)
    return products


@functools.cache
def kernels_for(device: torch.device, width: int) -> ModuleType | None:
    """Return `distav.memory.top_k_kernels` if they run on the device and pass their self-test at width D, else None."""
    if device.type != "cuda":
        return None
    try:
        from distav.memory import top_k_kernels as kernels

        kernels.self_test(device, width)
    except Exception as error:  # noqa: BLE001  # Triton may raise anything where it cannot compile
        log.warning(
            "k-NN search on %s with width %d uses PyTorch operators instead of Triton kernels, which is slower: %s: %s",
            device,
            width,
            type(error).__name__,
            error,
        )
        return None
    return kernels
