"""Exact nearest neighbours among features that are sharded over ranks by id.

Queries stay where they are. Keys come to them: all at once where they fit, or shard by shard round the ring of ranks,
one step ahead of the search.
Legend: N samples, n samples of this rank, D width, k neighbours.
"""

import contextlib
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from distav.memory.reservoir import NOT_SEEN, unpacked_ids, unpacked_scores
from distav.memory.selection import Shard, Tiling, Workspace, best_of
from distav.world import gather_objects, gather_ragged_rows, num_ranks, passing_shards, row_range

LARGEST_K = 2048
GATHER_BELOW_BYTES = 2**30
"""Up to this size every rank takes all keys at once: the bound of a query is then found once and not in each shard."""


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
    """Find the k samples of largest dot product for each of this rank's samples.

    A sample is never its own neighbour, nor is any of its group (clips of one source video carry the same wrong
    label). Equal similarities are ordered by id. A similarity does not depend on how the work is cut, so every number
    of ranks finds the same neighbours. On a GPU a first pass in bfloat16 leaves out what its rounding error cannot
    bring back; the rest is scored in full.

    Args:
        features: [n, D] of this rank's ids, `row_range(N)`.
        k: neighbours wanted, at most 2048 and below N.
        groups: [N] int64 group of every sample, the same on every rank.
        valid: [N] bool, whether a sample has features at all.
        queries: [q] int64 ids of this rank to search for; all of them where None.
        tiling: how the search is cut; by the device where None.
        gather_below_bytes: size of all keys up to which they are gathered; above it they go round the ring.

    Returns:
        ids [q, k] int64, -1 where a sample has fewer, and similarities [q, k] float32, 0 there.

    Raises:
        ValueError: where k is out of range, a query belongs to another rank, or features of valid samples are not
            finite or all zero; on every rank alike.
    """
    num_samples, device = len(groups), features.device
    own = row_range(num_samples)
    if not 1 <= k <= min(LARGEST_K, num_samples - 1):
        allowed = f"1 to {min(LARGEST_K, num_samples - 1)}"
        raise ValueError(f"k={k} neighbours among {num_samples} samples; allowed: {allowed}")
    features = features.detach().float().contiguous()
    largest = _largest_length(features, valid[own.start : own.stop], own.start)
    places = torch.arange(len(own), device=device) if queries is None else queries - own.start
    if len(places) and (int(places.min()) < 0 or int(places.max()) >= len(own)):
        raise ValueError(f"queries must be ids of this rank, {own.start} to {own.stop - 1}")
    tiling = tiling or Tiling.for_device(device)
    sorted_groups, order = groups.sort(stable=True)
    best = torch.full((len(places), k), NOT_SEEN, device=device)
    with _workers(device) as workers:
        spaces: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
        for _ in range(workers):
            spaces.put(Workspace(tiling, device))
        with ThreadPoolExecutor(workers) as pool:
            for first_id, keys in _keys(features, num_samples, gather_below_bytes):
                if not len(keys):
                    continue
                shard = Shard.of(keys, first_id, valid[first_id : first_id + len(keys)], largest, tiling)

                def search(start: int, shard: Shard = shard) -> None:
                    part = slice(start, start + tiling.queries)
                    asked = places[part]
                    mine = groups[own.start + asked]
                    barred = _same_group(mine, sorted_groups, order, shard.first_id, len(shard.keys))
                    space = spaces.get()
                    try:
                        best[part] = best_of(features[asked], shard, best[part], barred, tiling, space)
                    finally:
                        spaces.put(space)

                list(pool.map(search, range(0, len(places), tiling.queries)))
    seen = best != NOT_SEEN
    return unpacked_ids(best).masked_fill(~seen, -1), unpacked_scores(best).masked_fill(~seen, 0.0)


def _keys(features: Tensor, num_samples: int, gather_below_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the features of all ranks in one or more parts, each with the id of its first row."""
    if num_samples * features.shape[1] * features.element_size() <= gather_below_bytes:
        yield 0, gather_ragged_rows(features)
        return
    sizes = [len(row_range(num_samples, owner)) for owner in range(num_ranks())]
    for owner, keys in passing_shards(features, sizes):
        yield row_range(num_samples, owner).start, keys


def _largest_length(features: Tensor, valid: Tensor, first_id: int) -> float:
    """Return the largest length of a feature on any rank; refuse those that say nothing, on all ranks at once."""
    length = features.norm(dim=1)
    wrong = {"not finite": valid & ~torch.isfinite(length), "all zero": valid & (length == 0)}
    largest = float(length[valid].amax()) if valid.any() else 0.0
    firsts = {reason: (bad.nonzero().squeeze(1)[:5] + first_id).tolist() for reason, bad in wrong.items()}
    told = gather_objects((largest, firsts))
    for reason in wrong:
        ids = sum((firsts[reason] for _, firsts in told), [])
        if ids:
            raise ValueError(
                f"features of samples {', '.join(map(str, ids[:5]))} are {reason}, so they have no neighbours; "
                "leave them out with valid=False"
            )
    return max(largest for largest, _ in told)


def _same_group(
    mine: Tensor, sorted_groups: Tensor, order: Tensor, first_id: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Return rows and key places of all pairs of one group: groups [b] of the queries -> [p], [p]."""
    low = torch.searchsorted(sorted_groups, mine)
    counts = torch.searchsorted(sorted_groups, mine, right=True) - low
    row = torch.repeat_interleave(torch.arange(len(mine), device=mine.device), counts)
    within = torch.arange(len(row), device=mine.device) - (counts.cumsum(0) - counts)[row]
    place = order[low[row] + within] - first_id
    here = (place >= 0) & (place < num_keys)
    return row[here], place[here]


@contextlib.contextmanager
def _workers(device: torch.device) -> Iterator[int]:
    """Let each worker run on one CPU thread: blocks in parallel waste less than the parts of one block."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield threads
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
