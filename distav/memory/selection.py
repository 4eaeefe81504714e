"""The k best keys of each query out of one block of queries and one shard of keys, exactly.

A full top-k over every score costs more than the scores themselves. Here a bound per query, taken from the first tile
of keys, lets only a few hundred scores of each row pass; those are kept in a reservoir and sorted once.
Legend: b queries, n keys, D width, k wanted, s reservoir slots.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.memory.reservoir import LOWEST, NOT_SEEN, Reservoir, nth_largest, packed, score_or_lowest

SMALLEST_GEMM = 32
"""Fewest rows of either matrix of a product. BLAS sums the products of thinner matrices in another order, and with
them the scores, and the order of near ties, would hang on how the work is cut."""


@dataclass(frozen=True)
class Tiling:
    """How a search is cut: queries and keys scored at a time, and the number format of the first pass."""

    queries: int
    keys: int
    coarse: torch.dtype | None = None

    @staticmethod
    def for_device(device: torch.device) -> "Tiling":
        """Return blocks whose scores stay in the last cache: 8 MiB on a CPU, 32 MiB on a GPU."""
        if device.type == "cuda":
            return Tiling(4096, 4096, torch.bfloat16)
        return Tiling(1024, 2048)


class Workspace:
    """Buffers that one worker uses again and again."""

    def __init__(self, tiling: Tiling, device: torch.device):
        area = max(tiling.queries, SMALLEST_GEMM) * (max(tiling.keys, SMALLEST_GEMM) + 16)
        self.scores = torch.empty(area, dtype=tiling.coarse or torch.float32, device=device)
        self.passed = torch.empty(area, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class Shard:
    """Keys of one rank, ready to be scored.

    Attributes:
        keys: [n, D] float32.
        tiles: T parts of the keys in the format of the first pass, filled up with zeros; key j is row j // T of tile
            j mod T, so that each tile is an even sample of the shard.
        first_id: id of the first key.
        unusable: [u] places that are no neighbours of anyone, those filled up among them.
        largest: a length that no key exceeds.
    """

    keys: Tensor
    tiles: list[Tensor]
    first_id: int
    unusable: Tensor
    largest: float

    @staticmethod
    def of(keys: Tensor, first_id: int, valid: Tensor, largest: float, tiling: Tiling) -> "Shard":
        """Prepare float32 keys [n, D] of that largest length; `valid` [n] says which of them may be neighbours."""
        num_tiles = max(1, min(math.ceil(len(keys) / tiling.keys), len(keys) // SMALLEST_GEMM))
        # Products whose rows are no multiple of 64 bytes, or whose factors lie apart, take a quarter longer.
        width = math.ceil(max(len(keys), SMALLEST_GEMM) / num_tiles / 16) * 16
        tiles = keys.new_empty(num_tiles, width, keys.shape[1], dtype=tiling.coarse or torch.float32)
        full, rest = divmod(len(keys), num_tiles)
        tiles[:, :full] = keys[: full * num_tiles].view(full, num_tiles, -1).transpose(0, 1)
        tiles[:, full:] = 0
        tiles[:rest, full : full + 1] = keys[full * num_tiles :, None]
        fill = torch.arange(len(keys), width * num_tiles, device=keys.device)
        unusable = torch.cat([(~valid).nonzero().squeeze(1), fill])
        return Shard(keys, list(tiles), first_id, unusable, largest)


def best_of(
    queries: Tensor,
    shard: Shard,
    best: Tensor,
    barred: tuple[Tensor, Tensor],
    tiling: Tiling,
    space: Workspace,
    guess: bool = True,
) -> Tensor:
    """Merge the best keys of a shard into the best found so far.

    Each query's bound is the k-th best found in other shards. In the first shard there is none; there the tiles seen so
    far, each time their number doubles, give one: the k-th largest score among them, which can never be too high, or,
    to let fewer scores pass, the one that a sample of this size lets expect, with a margin of four standard deviations.
    Rows for which a guess was too high end with fewer than k scores above the bound; they are searched again without
    guessing. So the result is exact either way.

    With a coarse first pass every score that comes within its rounding error of the bound is computed again in
    float64 and rounded to float32.

    Args:
        queries: [b, D] float32.
        shard: the keys.
        best: [b, k] packed scores and ids, in descending order, NOT_SEEN where there are fewer.
        barred: rows [p] and key places [p] of pairs that must not be neighbours.
        tiling: how the work is cut.
        space: buffers of this worker.
        guess: whether the bound may be guessed.

    Returns:
        [b, k] packed, in descending order.
    """
    num, k, num_tiles = len(queries), best.shape[1], len(shard.tiles)
    total = sum(map(len, shard.tiles))
    coarse = queries.to(shard.tiles[0].dtype)
    if num < SMALLEST_GEMM:
        coarse = torch.cat([coarse, coarse.new_zeros(SMALLEST_GEMM - num, coarse.shape[1])])
    error = _rounding(queries, shard, tiling)
    bound = score_or_lowest(best[:, -1])[:, None] - error
    bounded = not bool((best[:, -1] == NOT_SEEN).any())
    reservoir = Reservoir(best, slots=k + len(shard.tiles[0]))
    barred_in = _by_tile(barred, shard.unusable, num_tiles)
    for tile, keys in enumerate(shard.tiles):
        area = len(coarse) * len(keys)
        scores = torch.mm(coarse, keys.T, out=space.scores[:area].view(len(coarse), len(keys)))[:num]
        rows, places, unusable = barred_in[tile]
        scores[rows, places] = -torch.inf
        if len(unusable):
            scores[:, unusable] = -torch.inf
        if not bounded and tile & (tile - 1) == 0:  # 0 and the powers of two
            seen = tile / num_tiles or len(keys) / total
            rank = min(k, _guessed_rank(k * seen)) if guess else k
            if tile:
                bound = torch.maximum(bound, reservoir.nth_largest(rank) - error)
            elif rank <= len(keys):
                bound = torch.maximum(bound, nth_largest(scores, rank)[:, None].float() - 2 * error)
        bound.clamp_min_(LOWEST)
        flat, row = _passing(scores, bound, space.passed)
        counts = torch.bincount(row, minlength=num)
        if not reservoir.has_room(counts):
            bound = torch.maximum(bound, reservoir.compacted() - error).clamp_min_(LOWEST)
            flat, row = _passing(scores, bound, space.passed)
            counts = torch.bincount(row, minlength=num)
        place = tile + (flat - row * len(keys)) * num_tiles
        if tiling.coarse is None:
            exact = scores.view(-1).index_select(0, flat)
        else:
            exact = dot_products(queries, shard.keys, row, place)
        reservoir.add(row, counts, packed(exact, shard.first_id + place))
    found = reservoir.sorted()
    missed = (score_or_lowest(found[:, -1])[:, None] < bound + error).squeeze(1).nonzero().squeeze(1)
    if guess and len(missed):
        position = torch.full_like(found[:, 0], -1)
        position[missed] = torch.arange(len(missed), device=position.device)
        row = position[barred[0]]
        again = row[row >= 0], barred[1][row >= 0]
        found[missed] = best_of(queries[missed], shard, best[missed], again, tiling, space, guess=False)
    return found


def _rounding(queries: Tensor, shard: Shard, tiling: Tiling) -> Tensor:
    """Bound the error of a coarse score: [b, 1].

    Three roundings to bfloat16 (both inputs and the result, 2^-9 each) and a float32 sum of D terms.
    """
    if tiling.coarse is None:
        return queries.new_zeros(len(queries), 1)
    unit = torch.finfo(tiling.coarse).eps / 2
    relative = 1.02 * (3 * unit + queries.shape[1] * 2.0**-23)
    return relative * shard.largest * queries.norm(dim=1, keepdim=True)


def _guessed_rank(expected: float) -> int:
    """Return the rank in a sample of a score that is too high for the whole in less than one of ten thousand rows."""
    return math.ceil(((4 + math.sqrt(16 + 4 * expected)) / 2) ** 2)


def _by_tile(barred: tuple[Tensor, Tensor], unusable: Tensor, num_tiles: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Split barred pairs and unusable keys by tile: rows, columns, and columns that are barred in every row."""
    rows, places = barred
    order = (places % num_tiles).argsort(stable=True)
    counts = torch.bincount(places % num_tiles, minlength=num_tiles).tolist()
    pairs = zip(rows[order].split(counts), (places[order] // num_tiles).split(counts), strict=True)
    return [(*pair, unusable[unusable % num_tiles == tile] // num_tiles) for tile, pair in enumerate(pairs)]


def _passing(scores: Tensor, bound: Tensor, passed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places in the flattened scores, and the rows, of those that reach the bound of their row."""
    above = passed[: scores.numel()].view(scores.shape)
    if scores.device.type == "cpu" and scores.dtype is torch.float32:
        # NumPy compares and searches several times as fast as PyTorch does on one CPU thread.
        np.greater_equal(scores.numpy(), bound.numpy(), out=above.numpy())
        flat = torch.from_numpy(np.flatnonzero(above.numpy()))
    else:
        flat = torch.ge(scores, bound, out=above).view(-1).nonzero().squeeze(1)
    return flat, torch.div(flat, scores.shape[1], rounding_mode="trunc")


def dot_products(queries: Tensor, keys: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Return queries[row] . keys[place] in float64, rounded to float32: [p].

    Products are added by folding the vector in halves, an order that no device or batch size changes.
    """
    found = queries.new_empty(len(row))
    chunk = 2**18
    for start in range(0, len(row), chunk):
        part = slice(start, start + chunk)
        terms = queries[row[part]].double() * keys[place[part]].double()
        while terms.shape[1] > 1:
            half = terms.shape[1] // 2
            odd = terms[:, 2 * half :]
            terms = torch.cat([terms[:, :half] + terms[:, half : 2 * half], odd], dim=1)
        found[part] = terms.squeeze(1).float()
    return found
