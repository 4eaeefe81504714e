"""Exact nearest neighbours among features that are sharded over ranks by id.

Queries stay where they are. Keys come to them: all at once where they fit, or shard by shard round the ring of ranks,
one step ahead of the search.
Legend: N samples, n samples of this rank, D width, k neighbours.
"""

import contextlib
import functools
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

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
from distav.memory.reservoir import EMPTY, unpacked_ids, unpacked_scores
from distav.memory.top_k import exact_top_k

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
    of ranks finds the same neighbours. On a GPU a first pass in 16 bits leaves out what its rounding error cannot bring
    back; the rest is scored in full.

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
    own = shard_range(num_samples)
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
    best = torch.full((len(places), k), EMPTY, device=device)
    spaces: queue.SimpleQueue[Workspace] = queue.SimpleQueue()

    def search(rows: Tensor, shard: KeyShard, first: bool, guess: bool) -> Tensor:
        asked, before = places[rows], best[rows]
        barred = shard.excluded(*_same_group(groups[own.start + asked], sorted_groups, order))
        space = spaces.get()
        try:
            found, again = exact_top_k(features[asked], shard, before, barred, space, first=first, estimate_bound=guess)
        finally:
            spaces.put(space)
        best[rows] = torch.where(again[:, None], before, found)
        return again

    first = True
    with _workers(device) as (workers, mapped), _sums_in_float32():
        for _ in range(workers):
            spaces.put(Workspace(tiling, device))
        for first_id, keys in _keys(features, num_samples, gather_below_bytes):
            usable = valid[first_id : first_id + len(keys)].nonzero().squeeze(1)
            if not len(usable):
                continue
            shard = KeyShard.of(keys, first_id, usable, largest, tiling)
            rows = torch.arange(len(places), device=device)
            for guess in (True, False):
                if len(rows):
                    block = functools.partial(search, shard=shard, first=first, guess=guess)
                    rows = rows[torch.cat(list(mapped(block, rows.split(tiling.queries))))]
            first = False
    seen = best != EMPTY
    return unpacked_ids(best).masked_fill(~seen, -1), unpacked_scores(best).masked_fill(~seen, 0.0)


def _keys(features: Tensor, num_samples: int, gather_below_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the features of all ranks in one or more parts, each with the id of its first row."""
    if num_samples * features.shape[1] * features.element_size() <= gather_below_bytes:
        yield 0, all_gather_variable_rows(features)
        return
    sizes = [len(shard_range(num_samples, owner)) for owner in range(get_world_size())]
    for owner, keys in ring_shards(features, sizes):
        yield shard_range(num_samples, owner).start, keys


def _largest_length(features: Tensor, valid: Tensor, first_id: int) -> float:
    """Return the largest length of a feature on any rank; refuse those that say nothing, on all ranks at once."""
    length = features.norm(dim=1)
    wrong = {"not finite": valid & ~torch.isfinite(length), "all zero": valid & (length == 0)}
    largest = float(length[valid].amax()) if valid.any() else 0.0
    firsts = {reason: (bad.nonzero().squeeze(1)[:5] + first_id).tolist() for reason, bad in wrong.items()}
    told = all_gather_objects((largest, firsts))
    for reason in wrong:
        ids = sum((firsts[reason] for _, firsts in told), [])
        if ids:
            raise ValueError(
                f"features of samples {', '.join(map(str, ids[:5]))} are {reason}, so they have no neighbours; "
                "leave them out with valid=False"
            )
    return max(largest for largest, _ in told)


def _same_group(mine: Tensor, sorted_groups: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and ids of all pairs of one group: groups [b] of the queries -> [p], [p]."""
    low = torch.searchsorted(sorted_groups, mine)
    counts = torch.searchsorted(sorted_groups, mine, right=True) - low
    row = torch.repeat_interleave(torch.arange(len(mine), device=mine.device), counts)
    within = torch.arange(len(row), device=mine.device) - (counts.cumsum(0) - counts)[row]
    return row, order[low[row] + within]


@contextlib.contextmanager
def _workers(device: torch.device) -> Iterator[tuple[int, Callable[..., Iterator[Tensor]]]]:
    """Yield the number of workers and what maps a function over blocks.

    On a CPU each worker runs on one thread: blocks in parallel waste less than the parts of one block. On a GPU the
    calling thread works alone, since its current device and stream are not those of a new thread.
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
def _sums_in_float32() -> Iterator[None]:
    """Let no product of 16-bit matrices on a GPU add parts up in 16 bits, which the bound on its error leaves out."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")]
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
