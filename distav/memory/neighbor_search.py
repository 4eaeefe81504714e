"""Parts of a neighbor search: the best keys found so far, the exchange of keys between ranks, and worker threads.

Legend: N samples, n samples of this rank, q queries, b queries of a block, D width, k neighbors, p pairs.
"""

import contextlib
import functools
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distav.distributed.collectives import (
    all_gather_objects,
    all_gather_variable_rows,
    get_world_size,
    ring_shards,
    shard_range,
)
from distav.memory.key_shard import KeyShard, Tiling, Workspace
from distav.memory.packing import EMPTY
from distav.memory.top_k import exact_top_k

MAX_K = 2048
GATHER_BELOW_BYTES = 2**30
"""Size of all keys up to which they are gathered: the bound of a query is then found once instead of in each shard."""

_MAX_LISTED_IDS = 5


@dataclass(frozen=True)
class SearchState:
    """State of a search.

    Attributes:
        features: [n, D] float32 of this rank.
        index: [q] row of each query in `features`.
        groups: [q] group of each query.
        sorted_groups: [N] groups of all samples in ascending order.
        order: [N] ids of all samples, sorted by group.
        best: [q, k] packed best keys of the shards searched so far; updated in place.
        max_norm: largest norm of a valid feature on any rank.
        tiling: sizes of the search.
        workspaces: one for each worker.
    """

    features: Tensor
    index: Tensor
    groups: Tensor
    sorted_groups: Tensor
    order: Tensor
    best: Tensor
    max_norm: float
    tiling: Tiling
    workspaces: queue.SimpleQueue[Workspace]

    @staticmethod
    def start(
        features: Tensor, k: int, groups: Tensor, valid: Tensor, queries: Tensor | None, tiling: Tiling | None
    ) -> "SearchState":
        """Return a search without results; see `distav.memory.knn.nearest_neighbors` for arguments and errors."""
        num_samples, device = len(groups), features.device
        own = shard_range(num_samples)
        if not 1 <= k <= min(MAX_K, num_samples - 1):
            allowed = f"1 to {min(MAX_K, num_samples - 1)}"
            raise ValueError(f"k={k} neighbors among {num_samples} samples; allowed: {allowed}")
        features = features.detach().float().contiguous()
        max_norm = _check_features(features, valid[own.start : own.stop], own.start)
        index = torch.arange(len(own), device=device) if queries is None else queries - own.start
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(own)):
            raise ValueError(f"queries must be ids of this rank, {own.start} to {own.stop - 1}")
        sorted_groups, order = groups.sort(stable=True)
        best = torch.full((len(index), k), EMPTY, device=device)
        return SearchState(
            features,
            index,
            groups[own.start + index],
            sorted_groups,
            order,
            best,
            max_norm,
            tiling or Tiling.for_device(device),
            queue.SimpleQueue(),
        )

    @contextlib.contextmanager
    def workers(self) -> Iterator[Callable[..., Iterator[Any]]]:
        """Context of the search; yields a function that maps another over parts of the work, in parallel on a CPU."""
        with _worker_pool(self.features.device) as (num_workers, map_parts), _float32_accumulation():
            for _ in range(num_workers):
                self.workspaces.put(Workspace(self.tiling, self.features.device))
            yield map_parts

    def search_shard(
        self, shard: KeyShard, rows: Tensor, first: bool, map_parts: Callable[..., Iterator[None]]
    ) -> None:
        """Merge the neighbors in a shard into `best`.

        All queries are searched with estimated bounds. Those with an estimate that was too high are searched again
        without estimation.

        Args:
            shard: the keys.
            rows: numbers of the queries to search for.
            first: whether these queries have not been searched in any shard before.
            map_parts: maps a function over blocks of queries.
        """
        for estimate_bound in (True, False):
            # A result that is allocated beside the candidates of a block would keep glibc from reusing their memory.
            again = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
            search_block = functools.partial(
                self._search_block, rows, shard, first=first, estimate_bound=estimate_bound, again=again
            )
            for _ in map_parts(search_block, range(0, len(rows), self.tiling.queries)):
                pass
            rows = rows[again]

    def _search_block(
        self, rows: Tensor, shard: KeyShard, start: int, *, first: bool, estimate_bound: bool, again: Tensor
    ) -> None:
        """Search for a block of the queries `rows` from `start` on, and set which have to be searched again."""
        part = slice(start, start + self.tiling.queries)
        rows = rows[part]
        queries, best = self.features[self.index[rows]], self.best[rows]
        excluded = shard.excluded_scores(*_same_group_pairs(self.groups[rows], self.sorted_groups, self.order))
        workspace = self.workspaces.get()
        try:
            merged, again[part] = exact_top_k(
                queries, shard, best, excluded, workspace, first=first, estimate_bound=estimate_bound
            )
        finally:
            self.workspaces.put(workspace)
        self.best[rows] = torch.where(again[part, None], best, merged)


def key_shards(features: Tensor, num_samples: int, gather_below_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the features of all ranks in one or more shards, each with the id of its first row."""
    if num_samples * features.shape[1] * features.element_size() <= gather_below_bytes:
        yield 0, all_gather_variable_rows(features)
        return
    sizes = [len(shard_range(num_samples, owner)) for owner in range(get_world_size())]
    for owner, keys in ring_shards(features, sizes):
        yield shard_range(num_samples, owner).start, keys


def _check_features(features: Tensor, valid: Tensor, first_id: int) -> float:
    """Return the largest norm of a valid feature on any rank.

    Raises:
        ValueError: if a valid feature on any rank is not finite or all zero.
    """
    norms = features.norm(dim=1)
    max_norm = float(norms[valid].amax()) if valid.any() else 0.0
    invalid = {"not finite": valid & ~torch.isfinite(norms), "all zero": valid & (norms == 0)}
    invalid_ids = {
        reason: (mask.nonzero().squeeze(1)[:_MAX_LISTED_IDS] + first_id).tolist() for reason, mask in invalid.items()
    }
    gathered = all_gather_objects((max_norm, invalid_ids))
    for reason in invalid:
        ids = [sample for _, ids_of_rank in gathered for sample in ids_of_rank[reason]]
        if ids:
            raise ValueError(
                f"features of samples {', '.join(map(str, ids[:_MAX_LISTED_IDS]))} are {reason}, so they have no "
                "neighbors; leave them out with valid=False"
            )
    return max(norm for norm, _ in gathered)


def _same_group_pairs(groups: Tensor, sorted_groups: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs of a query and a sample of its group.

    Args:
        groups: [b] group of each query.
        sorted_groups: [N] groups of all samples in ascending order.
        order: [N] ids of all samples, sorted by group.

    Returns:
        Query [p], an index into `groups`, and id [p] of each pair.
    """
    low = torch.searchsorted(sorted_groups, groups)
    counts = torch.searchsorted(sorted_groups, groups, right=True) - low
    row = torch.repeat_interleave(torch.arange(len(groups), device=groups.device), counts)
    offset = torch.arange(len(row), device=groups.device) - (counts.cumsum(0) - counts)[row]
    return row, order[low[row] + offset]


@contextlib.contextmanager
def _worker_pool(device: torch.device) -> Iterator[tuple[int, Callable[..., Iterator[Tensor]]]]:
    """Yield the number of workers, and a function that maps another over blocks of queries.

    On a CPU, each worker uses one thread: parallel blocks scale better than the parallel parts of one block. On a GPU,
    the calling thread is the only worker, since a new thread has another current device and stream.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield 1, map
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield threads, pool.map
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _float32_accumulation() -> Iterator[None]:
    """Sum products of 16-bit matrices in float32 on a GPU; the error bound does not cover sums in 16 bits."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("fp16", "bf16")]
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
