"""Approximate nearest neighbors with inverted lists: only keys whose centroids are near that of a query are searched.

The samples are divided into lists by the centroid of the largest dot product. The samples of a list are searched
together, in the lists whose centroids are nearest to its own, by the exact search of `distav.memory.top_k`. Each rank
has the lists of the keys of a shard and the queries of its own samples; keys are exchanged as in the exact search.
There are about 4 sqrt(N) lists, so the time is proportional to N sqrt(N) for a number of probes.
Legend: N samples, n samples of this rank, s keys of a shard, q queries, D width, k neighbors, L lists.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, compute_on_main_rank, local_shard
from distav.memory.key_shard import KeyShard, Tiling
from distav.memory.kmeans import fit_centroids, nearest_centroids
from distav.memory.neighbor_search import GATHER_BELOW_BYTES, SearchState, key_shards
from distav.memory.packing import EMPTY, unpack

LISTS_PER_ROOT = 4
"""Lists per square root of the number of samples. With smaller lists, the same number of searched keys has more of the
neighbors; but fewer queries share a product."""
SAMPLES_PER_LIST = 32
"""Keys per list that the centroids are fitted to."""
MIN_KEYS_PER_NEIGHBOR = 4
"""A query is searched in more lists if the nearest ones have less than this many keys for each of the k neighbors."""


def approximate_neighbors(
    features: Tensor,
    k: int,
    groups: Tensor,
    valid: Tensor,
    num_probes: int,
    *,
    queries: Tensor | None = None,
    tiling: Tiling | None = None,
    gather_below_bytes: int = GATHER_BELOW_BYTES,
    num_lists: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return neighbors as `distav.memory.knn.nearest_neighbors` does, of which some may be missed.

    The neighbors that are found have their exact similarities, and if all lists are probed, all are found. The result
    does not depend on the number of ranks. Lists are made by the directions of the features, so the norms of the
    features should be similar.

    Args:
        features, k, groups, valid, queries, tiling, gather_below_bytes: see `nearest_neighbors`.
        num_probes: lists that are searched for each sample, at least 1.
        num_lists: L; about 4 sqrt(N) by default.
        seed: seed of the centroids.

    Raises:
        ValueError: if `num_probes` or `num_lists` is below 1, or as `nearest_neighbors`; on all ranks alike.
    """
    return unpack(
        packed_approximate_neighbors(
            features, k, groups, valid, num_probes, queries, tiling, gather_below_bytes, num_lists, seed
        )
    )


def packed_approximate_neighbors(
    features: Tensor,
    k: int,
    groups: Tensor,
    valid: Tensor,
    num_probes: int,
    queries: Tensor | None = None,
    tiling: Tiling | None = None,
    gather_below_bytes: int = GATHER_BELOW_BYTES,
    num_lists: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Return the result of `approximate_neighbors` packed as by `distav.memory.knn.packed_neighbors`: [q, k] int64."""
    for name, value in (("num_probes", num_probes), ("num_lists", num_lists)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; allowed: 1 or more")
    search = SearchState.start(features, k, groups, valid, queries, tiling)
    num_valid = int(valid.sum())
    if not num_valid:
        return search.best
    with search.workers() as map_parts:
        count = min(num_lists or round(LISTS_PER_ROOT * num_valid**0.5), num_valid)
        centroids = _shared_centroids(search.features, valid, count, seed)
        own_lists = nearest_centroids(search.features, centroids, map_parts)[0]
        all_lists = all_gather_variable_rows(own_lists).masked_fill(~valid, len(centroids))
        probes = _Probes(centroids, torch.bincount(all_lists, minlength=len(centroids) + 1)[:-1], num_probes, k)
        rows_by_list = _members(own_lists[search.index], len(centroids))
        for first_id, keys in key_shards(search.features, len(groups), gather_below_bytes):
            keys_by_list = _members(all_lists[first_id : first_id + len(keys)], len(centroids))
            first_key = first_id

            def search_list(number: int, keys: Tensor = keys, first_key: int = first_key, keys_by_list=keys_by_list):
                rows = rows_by_list[number]
                if not len(rows):
                    return
                index = torch.cat([keys_by_list[probe] for probe in probes.of_list(number)]).sort().values
                if len(index):
                    shard = KeyShard.build(keys, first_key, index, search.max_norm, search.tiling)
                    first = bool((search.best[rows, 0] == EMPTY).all())
                    search.search_shard(shard, rows, first, map)

            for _ in map_parts(search_list, range(len(centroids))):
                pass
    return search.best


@dataclass(frozen=True)
class _Probes:
    """Lists that the samples of a list are searched in.

    Attributes:
        centroids: [L, D].
        sizes: [L] number of valid keys of each list.
        num_probes: smallest number of lists.
        k: number of neighbors.
    """

    centroids: Tensor
    sizes: Tensor
    num_probes: int
    k: int

    def of_list(self, number: int) -> list[int]:
        """Return the numbers of the nearest lists, in the order of their similarity."""
        nearest = (self.centroids @ self.centroids[number]).argsort(descending=True, stable=True)
        enough = int((self.sizes[nearest].cumsum(0) < MIN_KEYS_PER_NEIGHBOR * self.k).sum()) + 1
        return nearest[: max(self.num_probes, enough)].tolist()


def _shared_centroids(features: Tensor, valid: Tensor, num_lists: int, seed: int) -> Tensor:
    """Return centroids [L, D] that are fitted to a random subset of the valid keys of all ranks, the same on all."""
    ids = valid.nonzero().squeeze(1)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[: SAMPLES_PER_LIST * num_lists]
    selected = torch.zeros_like(valid)
    selected[ids[order.to(ids.device)]] = True
    points = F.normalize(all_gather_variable_rows(features[local_shard(selected)]), dim=1)
    return compute_on_main_rank(lambda: fit_centroids(points, num_lists, seed).cpu()).to(features.device)


def _members(lists: Tensor, num_lists: int) -> list[Tensor]:
    """Return the positions of the members of each list: [s] list of each position -> L tensors."""
    order = lists.argsort(stable=True)
    counts = torch.bincount(lists, minlength=num_lists)
    return list(order[: int(counts[:num_lists].sum())].split(counts[:num_lists].tolist()))
