"""Exact nearest neighbours among features that are sharded over ranks by id.

Legend: N samples, n samples of this rank, D width, k neighbours.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from distav.world import num_ranks, rank, row_range

QUERY_TILE, KEY_TILE = 512, 4096
NOT_SEEN = torch.iinfo(torch.int64).min


def nearest_neighbors(features: Tensor, k: int, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Find the k samples of largest dot product for each of this rank's samples.

    A sample is never its own neighbour, nor is any of its group (clips of one source video carry the same wrong
    label). Equal similarities are ordered by id, so every number of ranks finds the same neighbours.

    Args:
        features: [n, D] of this rank's ids, `row_range(N)`.
        k: neighbours wanted.
        groups: [N] int64 group of every sample, the same on every rank.
        valid: [N] bool, whether a sample has features at all.

    Returns:
        ids [n, k] int64, -1 where a sample has fewer, and similarities [n, k] float32, 0 there.

    Raises:
        ValueError: where k is not below N, or features of valid samples are not finite.
    """
    num_samples = len(groups)
    own = row_range(num_samples)
    if not 1 <= k < num_samples:
        raise ValueError(f"k={k} neighbours among {num_samples} samples; allowed: 1 to {num_samples - 1}")
    if not torch.isfinite(features[valid[own.start : own.stop]]).all():
        raise ValueError("features of some samples are not finite; nothing can be said about their neighbours")
    best = torch.full((len(features), k), NOT_SEEN, device=features.device)
    for owner in range(num_ranks()):
        rows = row_range(num_samples, owner)
        keys = features.float().contiguous() if owner == rank() else features.new_empty(len(rows), features.shape[1])
        if num_ranks() > 1:
            dist.broadcast(keys, owner)
        for start in range(0, len(rows), KEY_TILE):
            ids = torch.arange(rows.start + start, rows.start + min(start + KEY_TILE, len(rows)), device=keys.device)
            for first in range(0, len(features), QUERY_TILE):
                part = slice(first, first + QUERY_TILE)
                scores = features[part].float() @ keys[start : start + KEY_TILE].T
                mine = groups[own.start + first : own.start + first + len(scores)]
                barred = (mine[:, None] == groups[ids][None, :]) | ~valid[ids][None, :]
                ranked = _rankable(scores, ids).masked_fill_(barred, NOT_SEEN)
                best[part] = torch.cat([best[part], ranked], dim=1).topk(k, dim=1).values
    return _unranked(best)


def _rankable(scores: Tensor, ids: Tensor) -> Tensor:
    """Pack a score and an id into one integer that sorts by score, then by smaller id: [.., n] -> [.., n] int64."""
    bits = (scores + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, ~bits ^ torch.iinfo(torch.int32).min, bits).long()
    return (ordered << 32) | (0xFFFFFFFF - ids)


def _unranked(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Take ids and scores out of what `_rankable` packed."""
    seen = packed != NOT_SEEN
    ordered = (packed >> 32).int()
    bits = torch.where(ordered < 0, ~(ordered ^ torch.iinfo(torch.int32).min), ordered)
    ids = 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    return ids.masked_fill(~seen, -1), bits.view(torch.float32).masked_fill(~seen, 0.0)
