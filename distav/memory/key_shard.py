"""Keys of one rank, split into tiles that are scored against queries.

Legend: b queries, n keys, m valid keys, D width, T tiles of w keys, p pairs.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.memory.coarse_candidates import MAX_QUERIES

MIN_GEMM_ROWS = 32
"""Smallest number of rows of either matrix of a product. BLAS sums the products of thinner matrices in another order;
scores, and the order of near ties, would then depend on the tiling."""

GROUP_SIZE = 32
"""Keys of a tile that share one maximum. A search reads the maxima instead of the scores, and for each group that
passes one memory sector of 32 bytes per key; the total is smallest with groups of 16 to 64 keys."""


@dataclass(frozen=True)
class Tiling:
    """Sizes of a search.

    Attributes:
        queries: queries scored at a time.
        keys: keys scored at a time.
        coarse: 16-bit format of the first pass; None to score in float32 at once.
    """

    queries: int
    keys: int
    coarse: torch.dtype | None = None

    def __post_init__(self):
        if self.coarse is not None and self.queries > MAX_QUERIES:
            raise ValueError(f"queries={self.queries} with a coarse first pass; allowed: up to {MAX_QUERIES}")

    @staticmethod
    def for_device(device: torch.device) -> "Tiling":
        """Return the tiling for a device: 8 MiB of scores on a CPU, which fit its cache, 512 MiB on a GPU."""
        if device.type == "cuda":
            # float16 is as fast as bfloat16 and has an eighth of its error, so fewer keys are scored again.
            return Tiling(4096, 65536, torch.float16)
        return Tiling(1024, 2048)


class Workspace:
    """Buffers that one worker reuses for all tiles."""

    def __init__(self, tiling: Tiling, device: torch.device):
        size = max(tiling.queries, MIN_GEMM_ROWS) * (max(tiling.keys, MIN_GEMM_ROWS) + 4 * GROUP_SIZE)
        self.scores = torch.empty(size, dtype=tiling.coarse or torch.float32, device=device)
        self.passing = torch.empty(0 if tiling.coarse else size, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class KeyShard:
    """Keys of one rank, prepared for scoring.

    Attributes:
        keys: [m, D] float32 valid keys.
        ids: [m] int64.
        first_id: id of the first key, valid or not.
        key_index: [n] int64 index of each id among the valid keys, -1 for other ids.
        tiles: T parts of the keys times `scale` in the format of the first pass, each [w, D]. Key j is row j // T of
            tile j mod T, so each tile is an even sample of the shard. The last rows may be padded with zeros.
        scale: power of two by which a coarse first pass multiplies the keys, so that their norms are at most 1.
        max_norm: upper bound of the norms of the scaled keys.
        residual: largest norm of the rounding error of a scaled key; no dimensions.
    """

    keys: Tensor
    ids: Tensor
    first_id: int
    key_index: Tensor
    tiles: list[Tensor]
    scale: float
    max_norm: float
    residual: Tensor

    @staticmethod
    def build(keys: Tensor, first_id: int, valid_index: Tensor, max_norm: float, tiling: Tiling) -> "KeyShard":
        """Prepare keys.

        Args:
            keys: [n, D] float32.
            first_id: id of the first key.
            valid_index: [m] indices of the keys that may be neighbors.
            max_norm: upper bound of the norms of these keys.
            tiling: sizes of the search.
        """
        key_index = torch.full((len(keys),), -1, device=keys.device)
        key_index[valid_index] = torch.arange(len(valid_index), device=keys.device)
        if len(valid_index) < len(keys):
            keys = keys[valid_index]
        num_tiles = max(1, min(math.ceil(len(keys) / tiling.keys), len(keys) // MIN_GEMM_ROWS))
        # Products whose rows are not a multiple of 64 bytes, or whose factors are not contiguous, take 25 % longer.
        multiple = 4 * GROUP_SIZE if tiling.coarse else 16
        width = math.ceil(max(len(keys), MIN_GEMM_ROWS) / num_tiles / multiple) * multiple
        tiles = keys.new_empty(num_tiles, width, keys.shape[1], dtype=tiling.coarse or torch.float32)
        scale = 2.0 ** -math.ceil(math.log2(max_norm)) if tiling.coarse and max_norm else 1.0
        residual = keys.new_zeros(())
        for number, tile in enumerate(tiles):
            part = keys[number::num_tiles]
            tile[len(part) :] = 0
            if tiling.coarse is None:
                tile[: len(part)] = part
            else:
                scaled = part * scale
                tile[: len(part)] = scaled
                residual = torch.maximum(residual, (scaled - tile[: len(part)]).norm(dim=1).amax())
        ids = valid_index + first_id
        return KeyShard(keys, ids, first_id, key_index, list(tiles), scale, max_norm * scale, residual)

    def excluded_scores(self, row: Tensor, ids: Tensor) -> list[Tensor]:
        """Return for each tile the indices of excluded pairs in its flattened scores [b * w].

        Args:
            row: [p] query of each pair, an index into the block of queries.
            ids: [p] key of each pair; ids of other shards are ignored.
        """
        num_tiles, width = len(self.tiles), len(self.tiles[0])
        offset = ids - self.first_id
        in_shard = (offset >= 0) & (offset < len(self.key_index))
        index = self.key_index[offset.masked_fill(~in_shard, 0)].masked_fill(~in_shard, -1)
        tile, order = (index % num_tiles).masked_fill_(index < 0, num_tiles).sort(stable=True)
        flat = (row * width + torch.div(index, num_tiles, rounding_mode="trunc"))[order]
        edges = torch.searchsorted(tile, torch.arange(num_tiles + 1, device=tile.device)).tolist()
        return [flat[low:high] for low, high in itertools.pairwise(edges)]

    def scores(self, queries: Tensor, tile: int, excluded: Tensor, workspace: Workspace) -> Tensor:
        """Return the dot products of scaled queries [b, D] with the keys of a tile: [b, w].

        Pairs at the flat indices `excluded`, and the padding of the tile, are -inf.
        """
        keys = self.tiles[tile]
        flat = workspace.scores[: len(queries) * len(keys)]
        scores = torch.mm(queries, keys.T, out=flat.view(len(queries), len(keys)))
        flat.index_fill_(0, excluded, -torch.inf)
        num_keys = len(range(tile, len(self.keys), len(self.tiles)))
        if num_keys < len(keys):
            scores[:, num_keys:].fill_(-torch.inf)
        return scores
