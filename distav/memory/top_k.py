"""The k best keys of each query out of one block of queries and one shard of keys, exactly.

A full top-k over every score costs more than the scores themselves. Here a bound per query, taken from the first tile
of keys, lets only a few hundred scores of each row pass; those are kept and sorted once.

Where the scores are rounded to 16 bits, on a GPU, the bound is lowered by what the rounding can have changed, and the
keys that pass are scored again in float64. The large tiles keep the number of operators small beside the product: a
tile of 4,096 queries and 65,536 keys takes an H100 some 300 microseconds to multiply and an operator 5 to launch.
Legend: b queries, n keys, m of them usable, D width, k wanted, T tiles of w keys, p pairs.
"""

import functools
import logging
import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from distav.memory.key_shard import GROUP, SMALLEST_GEMM, KeyShard, Workspace
from distav.memory.reservoir import (
    LOWEST,
    Candidates,
    Reservoir,
    largest_first,
    largest_of_rows,
    nth_largest,
    packed,
    score_or_lowest,
)

log = logging.getLogger("distav")

LONGEST_LIST = 2**24
"""Candidates of a block that are kept before they are scored in full."""

SLOTS = 1024
"""Fewest candidates of a query that kernels have room for; a row of which more pass is searched again without them."""


def exact_top_k(
    queries: Tensor,
    shard: KeyShard,
    best: Tensor,
    excluded: list[Tensor],
    space: Workspace,
    *,
    first: bool,
    estimate_bound: bool,
) -> tuple[Tensor, Tensor]:
    """Merge the best keys of a shard into the best found so far.

    Each query's bound is the k-th best found in other shards. In the first shard there is none; there the tiles seen so
    far, each time their number doubles, give one: the k-th largest score among them, which can never be too high, or,
    to let fewer scores pass, the one that a sample of this size lets expect, with a margin of four standard deviations.
    Rows for which a guess was too high end with fewer than k scores above the bound; they are to be searched again
    without guessing. So the result is exact either way.

    With a coarse first pass every score that comes within its rounding error of the bound is computed again in
    float64 and rounded to float32.

    Args:
        queries: [b, D] float32.
        shard: the keys.
        best: [b, k] packed scores and ids, in descending order, NOT_SEEN where there are fewer.
        barred: what `Shard.barred` returned for these queries.
        space: buffers of this worker.
        first: whether no shard was searched before.
        guess: whether the bound may be guessed.

    Returns:
        [b, k] packed, in descending order, and [b] bool, which rows have to be searched again.
    """
    find = _best_exact if space.scores.dtype is torch.float32 else _best_coarse
    return find(queries, shard, best, excluded, space, first, estimate_bound)


def _best_exact(
    queries: Tensor,
    shard: KeyShard,
    best: Tensor,
    excluded: list[Tensor],
    space: Workspace,
    first: bool,
    estimate_bound: bool,
) -> tuple[Tensor, Tensor]:
    num, k, num_tiles, width = len(queries), best.shape[1], len(shard.tiles), len(shard.tiles[0])
    if num < SMALLEST_GEMM:
        queries = torch.cat([queries, queries.new_zeros(SMALLEST_GEMM - num, queries.shape[1])])
    bound = score_or_lowest(best[:, -1])[:, None]
    reservoir = Reservoir(best, slots=k + width)
    for tile in range(num_tiles):
        scores = shard.scores(queries, tile, excluded[tile], space)[:num]
        if first and tile & (tile - 1) == 0:  # 0 and the powers of two
            rank = _rank_of_bound(k, (tile or 1) / num_tiles, estimate_bound)
            if tile:
                bound = torch.maximum(bound, reservoir.nth_largest(rank))
            elif rank <= width:
                bound = torch.maximum(bound, nth_largest(scores, rank)[:, None])
        bound.clamp_min_(LOWEST)
        flat, row = _passing_exact(scores, bound, space.passed)
        counts = torch.bincount(row, minlength=num)
        if not reservoir.has_room(counts):
            bound = torch.maximum(bound, reservoir.compacted()).clamp_min_(LOWEST)
            flat, row = _passing_exact(scores, bound, space.passed)
            counts = torch.bincount(row, minlength=num)
        place = tile + (flat - row * width) * num_tiles
        reservoir.add(row, counts, packed(scores.view(-1).index_select(0, flat), shard.ids.index_select(0, place)))
    found = reservoir.sorted()
    return found, score_or_lowest(found[:, -1]) < bound.squeeze(1)


def _best_coarse(
    queries: Tensor,
    shard: KeyShard,
    best: Tensor,
    excluded: list[Tensor],
    space: Workspace,
    first: bool,
    estimate_bound: bool,
) -> tuple[Tensor, Tensor]:
    num, k, num_tiles, dtype = len(queries), best.shape[1], len(shard.tiles), space.scores.dtype
    scaled = queries * shard.scale
    rounded = scaled.to(dtype)
    error = _rounding(scaled, rounded, shard)
    # A key of this scaled score has passed: the bound is what its coarse score cannot fall below.
    reached = score_or_lowest(best[:, -1]) * shard.scale**2
    bound = torch.empty(num, dtype=dtype, device=queries.device)
    kernels = kernels_for(queries.device, queries.shape[1]) if estimate_bound else None
    candidates = Candidates(num, dtype, queries.device, slots=max(SLOTS, 4 * k) if kernels else 0)
    fresh = first

    def raise_bound(scores: Tensor) -> None:
        """Every row has keys enough that reach these coarse scores [b], -inf where it has not."""
        off = error + scores.abs() * (torch.finfo(dtype).eps / 2)
        torch.maximum(reached, scores - off, out=reached)
        bound.copy_((reached - error).clamp_min_(torch.finfo(dtype).min))

    def score_in_full() -> None:
        nonlocal best, fresh
        raise_bound(candidates.nth_largest(k))
        row, place = candidates.reaching(bound)
        candidates.clear()
        values = packed(dot_products(queries, shard.keys, row, place), shard.ids[place])
        found = largest_of_rows(values, row, num, k)
        best, fresh = found if fresh else largest_first(torch.cat([best, found], dim=1), k), False

    raise_bound(torch.full_like(error, -torch.inf))
    for tile in range(num_tiles):
        scores = shard.scores(rounded, tile, excluded[tile], space)
        if first and tile != 1 and tile & (tile - 1) == 0:  # 0 and the powers of two from 2 on
            rank = _rank_of_bound(k, (tile or 1) / num_tiles, estimate_bound)
            raise_bound(candidates.nth_largest(rank) if tile else _nth_largest_of_groups(scores, rank))
        if kernels:
            candidates.append_passing(kernels, scores, bound, tile, num_tiles)
            continue
        for row, column, score in _passing_coarse(scores, bound):
            candidates.add(row, score, column * num_tiles + tile)
            if candidates.count > LONGEST_LIST:
                score_in_full()
                torch.maximum(reached, score_or_lowest(best[:, -1]) * shard.scale**2, out=reached)
                raise_bound(torch.full_like(error, -torch.inf))
    score_in_full()
    return best, (score_or_lowest(best[:, -1]) * shard.scale**2 < reached) | candidates.overflowed


def _rounding(scaled: Tensor, rounded: Tensor, shard: KeyShard) -> Tensor:
    """Bound how far a coarse score may be off before it is rounded itself: [b].

    |q.k - q'.k'| <= |q - q'| |k| + |q'| |k - k'| for the rounded q' and k', and a float32 sum of D terms. The lengths
    of what the rounding took away are measured: on average they are 0.4 of what they might be.
    """
    limits = torch.finfo(rounded.dtype)
    lost, kept = (scaled - rounded).norm(dim=1), rounded.float().norm(dim=1)
    summed = (scaled.shape[1] + 2) * 2.0**-23 * shard.largest * scaled.norm(dim=1)
    return 1.01 * (lost * shard.largest + kept * shard.residual + summed) + limits.smallest_normal * limits.eps


def _rank_of_bound(k: int, share: float, estimate_bound: bool) -> int:
    """Return the rank among the scores of a share of all tiles that gives the bound.

    A guessed one is too high for the whole in less than one of ten thousand rows.
    """
    return min(k, math.ceil(((4 + math.sqrt(16 + 4 * k * share)) / 2) ** 2)) if estimate_bound else k


def _nth_largest_of_groups(scores: Tensor, rank: int) -> Tensor:
    """Return a coarse score that so many keys of each row reach, hardly below the largest: [b, w] -> [b] float32."""
    maxima = scores.view(len(scores), GROUP, -1).amax(1)
    if 2 * rank <= maxima.shape[1]:  # Few of the largest scores share a group.
        return nth_largest(maxima, rank).float()
    if rank <= scores.shape[1]:
        return nth_largest(scores, rank).float()
    return torch.full((len(scores),), -torch.inf, device=scores.device)


def _passing_exact(scores: Tensor, bound: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places in the flattened scores, and the rows, of those that reach the bound [b, 1] of their row."""
    above = passed[: scores.numel()].view(scores.shape)
    if scores.device.type == "cpu":
        # NumPy compares and searches several times as fast as PyTorch does on one CPU thread.
        np.greater_equal(scores.numpy(), bound.numpy(), out=above.numpy())
        flat = torch.from_numpy(np.flatnonzero(above.numpy()))
    else:
        flat = torch.ge(scores, bound, out=above).view(-1).nonzero().squeeze(1)
    return flat, torch.div(flat, scores.shape[1], rounding_mode="trunc")


def _passing_coarse(scores: Tensor, bound: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield rows, columns and values [p] of the scores [b, w] that reach the bound [b] of their row, in parts.

    The bound may be raised between parts.
    """
    grouped = scores.view(len(scores), GROUP, -1)
    rows, groups = (grouped.amax(1) >= bound[:, None]).nonzero(as_tuple=True)
    most = max(1, LONGEST_LIST // GROUP)
    for row, group in zip(rows.split(most), groups.split(most), strict=True):
        members = grouped[row, :, group]
        at, member = (members >= bound[row][:, None]).nonzero(as_tuple=True)
        yield row[at], torch.add(group[at], member, alpha=grouped.shape[2]), members[at, member]


def dot_products(queries: Tensor, keys: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Return queries[row] . keys[place] in float64, rounded to float32: [p].

    Products are added by folding the vector in halves, an order that no device or batch size changes.
    """
    width = queries.shape[1]
    kernels = kernels_for(queries.device, width)
    found = queries.new_empty(len(row))
    chunk = max(1, 2**24 // width)
    for start in range(0, len(row), chunk):
        part = slice(start, start + chunk)
        if kernels:
            terms = kernels.folded_products(queries, keys, row[part], place[part])
        else:
            terms = queries[row[part]].double().mul_(keys[place[part]])
        while terms.shape[1] > 1:
            half, odd = divmod(terms.shape[1], 2)
            folded = terms[:, :half] + terms[:, half : 2 * half]
            terms = torch.cat([folded, terms[:, -1:]], dim=1) if odd else folded
        found[part] = terms.squeeze(1)
    return found


@functools.cache
def kernels_for(device: torch.device, width: int) -> ModuleType | None:
    """Return `distav.memory.top_k_kernels` where they run on the device and agree with PyTorch operators at width D."""
    if device.type != "cuda":
        return None
    try:
        from distav.memory import top_k_kernels as kernels

        kernels.check(device, width)
    except Exception as error:  # noqa: BLE001  # whatever Triton raises where it cannot compile
        log.warning(f"neighbor search without Triton kernels, which takes longer: {type(error).__name__}: {error}")
        return None
    return kernels
