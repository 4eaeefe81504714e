"""Exact nearest-neighbor search, compared with FAISS or cuVS and with a matrix product and a full top-k.

Legend: N samples, D feature dimension, k neighbors.
"""

from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, shard_range
from distav.memory.coarse_top_k import dot_products
from distav.memory.knn import GATHER_BELOW_BYTES, nearest_neighbors
from tools.bench.multiprocess import cpu_seconds, run_on_ranks
from tools.bench.timing import Results, Setting


def random_features(rows: int, dim: int, device: torch.device) -> Tensor:
    """Return random unit vectors: [N, D]."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device)


def search(features: Tensor, k: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the neighbors of the queries, by default of all samples, excluding each sample itself."""
    rows = len(features)
    groups = torch.arange(rows, device=features.device)
    return nearest_neighbors(features, k, groups, torch.ones_like(groups, dtype=torch.bool), queries=queries)


def full_top_k(features: Tensor, k: int, queries: Tensor) -> None:
    """Compute all scores of a block of queries, then a full top-k: the straightforward implementation."""
    for block in queries.split(512):
        scores = features[block] @ features.T
        scores[torch.arange(len(block), device=block.device), block] = -torch.inf
        scores.topk(k, dim=1)


def top_k_in_tiles(features: Tensor, k: int, queries: Tensor) -> None:
    """Compute the scores in bfloat16 in tiles that fit into GPU memory, and a top-k of the rounded scores."""
    rounded, width = features.bfloat16(), 65536
    for block in queries.split(4096):
        best, ids = rounded.new_empty(len(block), 0), block.new_empty(len(block), 0)
        for start in range(0, len(rounded), width):
            scores = rounded[block] @ rounded[start : start + width].T
            row = ((block >= start) & (block < start + width)).nonzero().squeeze(1)
            scores[row, block[row] - start] = -torch.inf
            top = scores.topk(min(k, scores.shape[1]), dim=1)
            best, ids = torch.cat([best, top.values], dim=1), torch.cat([ids, top.indices + start], dim=1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            ids = ids.gather(1, kept)


def matrix_product(features: Tensor, queries: Tensor) -> None:
    """Compute the matrix product alone, in blocks that fit into the cache."""
    keys = features if features.device.type == "cpu" else features.bfloat16()
    size, width = (1024, 2048) if features.device.type == "cpu" else (4096, 4096)
    workspace = keys.new_empty(size * width)
    for query_ids in queries.split(size):
        query_block = keys[query_ids]
        for block in keys.split(width):
            out = workspace[: len(query_ids) * len(block)].view(len(query_ids), len(block))
            torch.mm(query_block, block.T, out=out)


def run(setting: Setting, rows: int, dim: int, k: int, num_queries: int, ring_rows: int) -> Results:
    """Measure the search.

    Args:
        setting: device, threads, rounds.
        rows: N.
        dim: D.
        k: number of neighbors.
        num_queries: number of queries of the first comparison; the second one has all samples.
        ring_rows: N of the samples sharded over ranks.
    """
    results = Results(
        "neighbors",
        {"rows": rows, "dim": dim, "k": k, "threads": setting.threads, "device": setting.device.type},
    )
    on_cpu = setting.device.type == "cpu"
    if not on_cpu:
        results.arguments["cuvs"] = metadata.version("cuvs") if util.find_spec("cuvs") else "not installed"
    features = random_features(rows, dim, setting.device)
    for name, count in ((f"{num_queries} queries", num_queries), ("all pairs", rows)):
        _compare_times(results, setting, features, k, name, count)
    if on_cpu:
        equal = _fraction_of_equal_ids(features, k, torch.arange(min(1000, rows)))
        results.add_ratio("fraction of ids equal to FAISS's, ties by id", equal, ">= 1")
    else:
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        search(features, k)
        peak = torch.cuda.max_memory_allocated(setting.device)
        results.add_value("memory of a search besides the features", (peak - before) / 2**30, "GiB")
    if on_cpu and setting.threads == 1:
        _measure_sharded(results, ring_rows, dim, k, setting.rounds)
    return results


def _compare_times(results: Results, setting: Setting, features: Tensor, k: int, name: str, count: int) -> None:
    """Compare the search for the first `count` samples with the alternatives for this device."""
    on_cpu, is_subset = setting.device.type == "cpu", count < len(features)
    queries = torch.arange(count, device=setting.device)
    reference = full_top_k if on_cpu else top_k_in_tiles
    candidates: dict[str, Callable[[], Any]] = {
        f"distav, {name}": lambda: search(features, k, queries),
        f"matrix product, {name}": lambda: matrix_product(features, queries),
    }
    if on_cpu:
        candidates[f"FAISS IndexFlatIP, {name}"] = _faiss(features, k, count, setting.threads)
    if is_subset or not on_cpu:
        candidates[f"matrix product and top-k, {name}"] = lambda: reference(features, k, queries)
    if is_subset and not on_cpu and util.find_spec("cuvs"):
        candidates[f"cuVS brute force, {name}"] = _cuvs(features, k, count)
    rounds = setting.rounds if is_subset else min(setting.rounds, 3 if on_cpu else 2)
    seconds = Setting(setting.device, setting.threads, rounds).interleaved(candidates)
    results.add_times(seconds, {candidate: (count, "queries/s") for candidate in seconds})
    ours = seconds[f"distav, {name}"]
    for peer in ("FAISS IndexFlatIP", "cuVS brute force"):
        if f"{peer}, {name}" in seconds:
            ratio = ours, seconds[f"{peer}, {name}"]
            results.add_ratio(f"distav / {peer.split()[0]}, {name}", ratio, "<= 1" if on_cpu else "")
    threshold = "" if on_cpu or is_subset else "<= 3"
    results.add_ratio(f"distav / matrix product, {name}", (ours, seconds[f"matrix product, {name}"]), threshold)
    if reference_seconds := seconds.get(f"matrix product and top-k, {name}"):
        results.add_ratio(f"matrix product and top-k / distav, {name}", (reference_seconds, ours))


def _faiss(features: Tensor, k: int, count: int, threads: int):  # noqa: ANN202
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())  # pyright: ignore[reportCallIssue]
    return lambda: index.search(features[:count].numpy(), k + 1)  # pyright: ignore[reportCallIssue]


def _cuvs(features: Tensor, k: int, count: int) -> Callable[[], Any]:
    from cuvs.neighbors import brute_force  # pyright: ignore[reportMissingImports]

    index = brute_force.build(features, metric="inner_product")
    return lambda: brute_force.search(index, features[:count], k + 1)


def _fraction_of_equal_ids(features: Tensor, k: int, queries: Tensor) -> float:
    """Compare with FAISS's ids after sorting both by exact score, then by id.

    FAISS sums products in another order, so scores that differ by a rounding error may be in another order there.
    """
    import faiss

    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())  # pyright: ignore[reportCallIssue]
    theirs = torch.from_numpy(index.search(features[queries].numpy(), k + 17)[1])  # pyright: ignore[reportCallIssue]
    theirs = theirs.masked_fill(theirs == queries[:, None], -1)
    ours = search(features, k + 15, queries)[0]
    return float(
        (_sort_by_score(features, queries, ours)[:, :k] == _sort_by_score(features, queries, theirs)[:, :k])
        .float()
        .mean()
    )


def _sort_by_score(features: Tensor, queries: Tensor, ids: Tensor) -> Tensor:
    row = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    scores = dot_products(features[queries], features, row, ids.clamp_min(0).flatten()).view(ids.shape)
    scores = scores.masked_fill(ids < 0, -torch.inf)
    by_id = ids.argsort(dim=1)
    ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
    return ids.gather(1, scores.argsort(dim=1, descending=True, stable=True))


def _measure_sharded(results: Results, rows: int, dim: int, k: int, rounds: int) -> None:
    """Measure total CPU time and equality of ids for samples sharded over 2 and 4 processes."""
    (single,) = run_on_ranks(1, _search_shard, rows, dim, k, rounds)
    results.add_value(f"one process, N={rows}", min(single["seconds"]), "CPU-s")
    for exchange, gather_below in (("all-gather", GATHER_BELOW_BYTES), ("ring exchange", 0)):
        for ranks in (2, 4):
            shards = run_on_ranks(ranks, _search_shard, rows, dim, k, rounds, gather_below)
            total = min(sum(shard["seconds"][number] for shard in shards) for number in range(rounds))
            name = f"{ranks} ranks, {exchange}"
            results.add_value(f"{name}, N={rows}", total, "CPU-s")
            results.add_ratio(f"{name} / one process, total CPU time", total / min(single["seconds"]), "<= 1.2")
            equal = float((shards[0]["ids"] == single["ids"]).float().mean())
            results.add_ratio(f"{name}, fraction of ids equal to one process's", equal, ">= 1")


def _search_shard(rows: int, dim: int, k: int, rounds: int, gather_below: int = GATHER_BELOW_BYTES) -> dict:
    shard = shard_range(rows)
    features = random_features(rows, dim, torch.device("cpu"))[shard.start : shard.stop].clone()
    groups = torch.arange(rows)
    valid = torch.ones(rows, dtype=torch.bool)

    def find() -> tuple[Tensor, Tensor]:
        return nearest_neighbors(features, k, groups, valid, gather_below_bytes=gather_below)

    return {"seconds": cpu_seconds(find, rounds), "ids": all_gather_variable_rows(find()[0])}
