"""Exact nearest neighbors among features that are sharded over ranks by id.

Queries stay on their rank. Keys are gathered from all ranks at once if they fit, or else passed shard by shard around
the ring of ranks, one step ahead of the search.
Legend: N samples, n samples of this rank, q queries, D width, k neighbors.
"""

import torch
from torch import Tensor

from distav.memory.key_shard import KeyShard, Tiling
from distav.memory.neighbor_search import GATHER_BELOW_BYTES, SearchState, key_shards
from distav.memory.packing import unpack


def nearest_neighbors(
    features: Tensor,
    k: int,
    groups: Tensor,
    valid: Tensor,
    *,
    queries: Tensor | None = None,
    tiling: Tiling | None = None,
    gather_below_bytes: int = GATHER_BELOW_BYTES,
) -> tuple[Tensor, Tensor]:
    """Return the k samples with the largest dot product for each of this rank's samples.

    A sample is not its own neighbor, nor is any sample of its group (clips of one source video have the same label
    error). Equal similarities are ordered by id. A similarity does not depend on the tiling, so any number of ranks
    returns the same neighbors. On a GPU, a first pass in 16 bits rules out keys that cannot be neighbors whatever its
    rounding error; the remaining keys are scored in full precision.

    Args:
        features: [n, D] of this rank's ids, `shard_range(N)`.
        k: number of neighbors, at most 2048 and below N.
        groups: [N] int64 group of every sample, the same on every rank.
        valid: [N] bool, whether a sample has features.
        queries: [q] int64 ids of this rank to search for; all of its ids if None.
        tiling: sizes of the search; chosen by device if None.
        gather_below_bytes: size of all keys up to which they are gathered; larger ones are passed around the ring.

    Returns:
        ids [q, k] int64, -1 where a sample has fewer neighbors, and similarities [q, k] float32, 0 there.

    Raises:
        ValueError: if k is out of range, a query belongs to another rank, or features of valid samples are not finite
            or all zero; on all ranks alike.
    """
    return unpack(packed_neighbors(features, k, groups, valid, queries, tiling, gather_below_bytes))


def packed_neighbors(
    features: Tensor,
    k: int,
    groups: Tensor,
    valid: Tensor,
    queries: Tensor | None = None,
    tiling: Tiling | None = None,
    gather_below_bytes: int = GATHER_BELOW_BYTES,
) -> Tensor:
    """Return the result of `nearest_neighbors` in 8 bytes per neighbor, see `distav.memory.packing`: [q, k] int64."""
    search = SearchState.start(features, k, groups, valid, queries, tiling)
    rows, first = torch.arange(len(search.index), device=features.device), True
    with search.workers() as map_parts:
        for first_id, keys in key_shards(search.features, len(groups), gather_below_bytes):
            valid_index = valid[first_id : first_id + len(keys)].nonzero().squeeze(1)
            if len(valid_index):
                shard = KeyShard.build(keys, first_id, valid_index, search.max_norm, search.tiling)
                search.search_shard(shard, rows, first, map_parts)
                first = False
    return search.best
