"""Keys cut into tiles, ready to be scored against queries.

Legend: b queries, n keys, m of them usable, D width, T tiles of w keys, p pairs.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.memory.reservoir import MOST_ROWS

SMALLEST_GEMM = 32
"""Fewest rows of either matrix of a product. BLAS sums the products of thinner matrices in another order, and with
them the scores, and the order of near ties, would depend on how the work is cut."""

GROUP = 32
"""Keys of a tile that share one maximum. The maxima are read instead of the scores, and of a group that passes one
memory sector of 32 bytes for each key: from 16 to 64 keys both together are least."""


@dataclass(frozen=True)
class Tiling:
    """How a search is cut: queries and keys scored at a time, and the 16-bit number format of a first pass or None."""

    queries: int
    keys: int
    coarse: torch.dtype | None = None

    def __post_init__(self):
        if self.coarse is not None and self.queries > MOST_ROWS:
            raise ValueError(f"queries={self.queries} at a time; allowed with a first pass: up to {MOST_ROWS}")

    @staticmethod
    def for_device(device: torch.device) -> "Tiling":
        """Return blocks of scores: 8 MiB on a CPU, which stay in its cache, and 512 MiB on a GPU."""
        if device.type == "cuda":
            # As fast as bfloat16, and its scores are off by an eighth: fewer have to be computed again.
            return Tiling(4096, 65536, torch.float16)
        return Tiling(1024, 2048)


class Workspace:
    """Buffers that one worker uses again and again."""

    def __init__(self, tiling: Tiling, device: torch.device):
        area = max(tiling.queries, SMALLEST_GEMM) * (max(tiling.keys, SMALLEST_GEMM) + 4 * GROUP)
        self.scores = torch.empty(area, dtype=tiling.coarse or torch.float32, device=device)
        self.passed = torch.empty(0 if tiling.coarse else area, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class KeyShard:
    """Keys of one rank, ready to be scored.

    Attributes:
        keys: [m, D] float32, those that may be neighbors.
        ids: [m] int64.
        first_id: id of the first key, usable or not.
        place: [n] int64, the place of each id among the usable keys, -1 for the others.
        tiles: T parts of the keys times `scale` in the format of the first pass, each [w, D]; key j is row j // T of
            tile j mod T, so that each tile is an even sample of the shard. The last rows may be filled up with zeros.
        scale: power of two that brings the keys of a coarse first pass to lengths of at most 1.
        largest: a length that no scaled key exceeds.
        residual: 0-dim, the largest length of what the format of the first pass takes from a scaled key.
    """

    keys: Tensor
    ids: Tensor
    first_id: int
    place: Tensor
    tiles: list[Tensor]
    scale: float
    largest: float
    residual: Tensor

    @staticmethod
    def of(keys: Tensor, first_id: int, usable: Tensor, largest: float, tiling: Tiling) -> "KeyShard":
        """Prepare float32 keys [n, D] of that largest length; only those at the places `usable` [m] are neighbors."""
        place = torch.full((len(keys),), -1, device=keys.device)
        place[usable] = torch.arange(len(usable), device=keys.device)
        if len(usable) < len(keys):
            keys = keys[usable]
        num_tiles = max(1, min(math.ceil(len(keys) / tiling.keys), len(keys) // SMALLEST_GEMM))
        # Products whose rows are no multiple of 64 bytes, or whose factors lie apart, take a quarter longer.
        multiple = 4 * GROUP if tiling.coarse else 16
        width = math.ceil(max(len(keys), SMALLEST_GEMM) / num_tiles / multiple) * multiple
        tiles = keys.new_empty(num_tiles, width, keys.shape[1], dtype=tiling.coarse or torch.float32)
        scale = 2.0 ** -math.ceil(math.log2(largest)) if tiling.coarse and largest else 1.0
        residual = keys.new_zeros(())
        for tile, stored in enumerate(tiles):
            part = keys[tile::num_tiles]
            stored[len(part) :] = 0
            if tiling.coarse is None:
                stored[: len(part)] = part
            else:
                scaled = part * scale
                stored[: len(part)] = scaled
                residual = torch.maximum(residual, (scaled - stored[: len(part)]).norm(dim=1).amax())
        return KeyShard(keys, usable + first_id, first_id, place, list(tiles), scale, largest * scale, residual)

    def excluded(self, row: Tensor, ids: Tensor) -> list[Tensor]:
        """Return for each tile the places in its flattened scores [b * w] of pairs that must not be neighbors.

        Args:
            row: [p] rows of the block of queries.
            ids: [p] what each must not find; ids of other shards are left out.
        """
        num_tiles, width = len(self.tiles), len(self.tiles[0])
        at = ids - self.first_id
        here = (at >= 0) & (at < len(self.place))
        place = self.place[at.masked_fill(~here, 0)].masked_fill(~here, -1)
        tile, order = (place % num_tiles).masked_fill_(place < 0, num_tiles).sort(stable=True)
        flat = (row * width + torch.div(place, num_tiles, rounding_mode="trunc"))[order]
        edges = torch.searchsorted(tile, torch.arange(num_tiles + 1, device=tile.device)).tolist()
        return [flat[low:high] for low, high in itertools.pairwise(edges)]

    def scores(self, queries: Tensor, tile: int, barred: Tensor, space: Workspace) -> Tensor:
        """Multiply scaled queries [b, D] by the keys of a tile; -inf where a pair is barred or no key: [b, w]."""
        keys = self.tiles[tile]
        area = space.scores[: len(queries) * len(keys)]
        scores = torch.mm(queries, keys.T, out=area.view(len(queries), len(keys)))
        area.index_fill_(0, barred, -torch.inf)
        used = len(range(tile, len(self.keys), len(self.tiles)))
        if used < len(keys):
            scores[:, used:].fill_(-torch.inf)
        return scores
