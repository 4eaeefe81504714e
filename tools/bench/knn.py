"""Exact nearest neighbors, beside FAISS or cuVS and beside a matrix product with a full top-k.

Legend: N samples, D width, k neighbors.
"""

from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, shard_range
from distav.memory.knn import GATHER_BELOW_BYTES, nearest_neighbors
from distav.memory.top_k import dot_products
from tools.bench.multiprocess import cpu_seconds, on_ranks
from tools.bench.timing import Results, Setting


def features_of(rows: int, dim: int, device: torch.device) -> Tensor:
    """Return random unit vectors: [N, D]."""
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1).to(device)


def search(features: Tensor, k: int, queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find neighbours of some of the samples among all but themselves."""
    rows = len(features)
    groups = torch.arange(rows, device=features.device)
    return nearest_neighbors(features, k, groups, torch.ones_like(groups, dtype=torch.bool), queries=queries)


def full_top_k(features: Tensor, k: int, queries: Tensor) -> None:
    """Do what one writes first: all scores of a block, then top-k."""
    for part in queries.split(512):
        scores = features[part] @ features.T
        scores[torch.arange(len(part), device=part.device), part] = -torch.inf
        scores.topk(k, dim=1)


def top_k_in_tiles(features: Tensor, k: int, queries: Tensor) -> None:
    """Do the same in tiles for which a GPU has memory, in bfloat16: neighbors by rounded scores."""
    rounded, width = features.bfloat16(), 65536
    for part in queries.split(4096):
        best, ids = rounded.new_empty(len(part), 0), part.new_empty(len(part), 0)
        for start in range(0, len(rounded), width):
            scores = rounded[part] @ rounded[start : start + width].T
            row = ((part >= start) & (part < start + width)).nonzero().squeeze(1)
            scores[row, part[row] - start] = -torch.inf
            found = scores.topk(min(k, scores.shape[1]), dim=1)
            best, ids = torch.cat([best, found.values], dim=1), torch.cat([ids, found.indices + start], dim=1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            ids = ids.gather(1, kept)


def products(features: Tensor, queries: Tensor) -> None:
    """Do the matrix product alone, in blocks that stay in the cache."""
    keys = features if features.device.type == "cpu" else features.bfloat16()
    size, width = (1024, 2048) if features.device.type == "cpu" else (4096, 4096)
    space = keys.new_empty(size * width)
    for part in queries.split(size):
        block_of_queries = keys[part]
        for block in keys.split(width):
            torch.mm(block_of_queries, block.T, out=space[: len(part) * len(block)].view(len(part), len(block)))


def run(setting: Setting, rows: int, dim: int, k: int, num_queries: int, ring_rows: int) -> Results:
    """Measure the search.

    Args:
        setting: device, threads, rounds.
        rows, dim, k: N, D, k.
        num_queries: samples searched for beside all of them.
        ring_rows: N of the set that is spread over ranks.
    """
    results = Results(
        "neighbors",
        {"rows": rows, "dim": dim, "k": k, "threads": setting.threads, "device": setting.device.type},
    )
    on_cpu = setting.device.type == "cpu"
    naive = full_top_k if on_cpu else top_k_in_tiles
    if not on_cpu:
        results.arguments["cuvs"] = metadata.version("cuvs") if util.find_spec("cuvs") else "not installed"
    features = features_of(rows, dim, setting.device)
    for name, count in ((f"{num_queries} queries", num_queries), ("all pairs", rows)):
        queries = torch.arange(count, device=setting.device)
        candidates = {
            f"distav, {name}": lambda queries=queries: search(features, k, queries),
            f"matrix product, {name}": lambda queries=queries: products(features, queries),
        }
        if on_cpu:
            candidates[f"FAISS IndexFlatIP, {name}"] = _faiss(features, k, count, setting.threads)
        if count < rows or not on_cpu:
            candidates[f"matrix product and top-k, {name}"] = lambda queries=queries: naive(features, k, queries)
        if count < rows and not on_cpu and util.find_spec("cuvs"):
            candidates[f"cuVS brute force, {name}"] = _cuvs(features, k, count)
        most = setting.rounds if count < rows else min(setting.rounds, 3 if on_cpu else 2)
        some = Setting(setting.device, setting.threads, most)
        seconds = some.interleaved(candidates)
        results.times(seconds, {each: (count, "queries/s") for each in seconds})
        ours = seconds[f"distav, {name}"]
        bar = "<= 1" if on_cpu else ""
        for peer in ("FAISS IndexFlatIP", "cuVS brute force"):
            if f"{peer}, {name}" in seconds:
                results.ratio(f"distav / {peer.split()[0]}, {name}", (ours, seconds[f"{peer}, {name}"]), bar)
        bar = "<= 3" if not on_cpu and count == rows else ""
        results.ratio(f"distav / matrix product, {name}", (ours, seconds[f"matrix product, {name}"]), bar)
        if f"matrix product and top-k, {name}" in seconds:
            results.ratio(
                f"matrix product and top-k / distav, {name}", (seconds[f"matrix product and top-k, {name}"], ours)
            )
    if not on_cpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
        before = torch.cuda.memory_allocated(setting.device)
        search(features, k)
        peak = torch.cuda.max_memory_allocated(setting.device)
        results.note("memory of a search beside the features", (peak - before) / 2**30, "GiB")
    if on_cpu:
        same = _share_of_equal_ids(features, k, torch.arange(min(1000, rows)))
        results.ratio("ids equal to FAISS's under the tie rule, share", same, ">= 1")
    if on_cpu and setting.threads == 1:
        _spread(results, ring_rows, dim, k, setting.rounds)
    return results


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


def _share_of_equal_ids(features: Tensor, k: int, queries: Tensor) -> float:
    """Compare with FAISS's ids after both are put in the order of the exact score, then of the id.

    FAISS adds up a product in another order, so two scores that differ by a rounding may change places there.
    """
    import faiss

    index = faiss.IndexFlatIP(features.shape[1])
    index.add(features.numpy())  # pyright: ignore[reportCallIssue]
    theirs = torch.from_numpy(index.search(features[queries].numpy(), k + 17)[1])  # pyright: ignore[reportCallIssue]
    itself = theirs == queries[:, None]
    theirs = theirs.masked_fill(itself, -1)
    ours = search(features, k + 15, queries)[0]
    return float(
        (_in_order(features, queries, ours)[:, :k] == _in_order(features, queries, theirs)[:, :k]).float().mean()
    )


def _in_order(features: Tensor, queries: Tensor, ids: Tensor) -> Tensor:
    row = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
    scores = dot_products(features[queries], features, row, ids.clamp_min(0).flatten()).view(ids.shape)
    scores = scores.masked_fill(ids < 0, -torch.inf)
    by_id = ids.argsort(dim=1)
    ids, scores = ids.gather(1, by_id), scores.gather(1, by_id)
    return ids.gather(1, scores.argsort(dim=1, descending=True, stable=True))


def _spread(results: Results, rows: int, dim: int, k: int, rounds: int) -> None:
    """Spread the set over 2 and 4 processes: CPU time of all together, and the same ids."""
    (alone,) = on_ranks(1, _part, rows, dim, k, rounds)
    results.note(f"one process, N={rows}", min(alone["seconds"]), "CPU-s")
    for way, gather_below in (("keys gathered", GATHER_BELOW_BYTES), ("keys round the ring", 0)):
        for ranks in (2, 4):
            parts = on_ranks(ranks, _part, rows, dim, k, rounds, gather_below)
            total = min(sum(part["seconds"][number] for part in parts) for number in range(rounds))
            name = f"{ranks} ranks, {way}"
            results.note(f"{name}, N={rows}", total, "CPU-s")
            results.ratio(f"{name} / one process, CPU time of all", total / min(alone["seconds"]), "<= 1.2")
            same = float((parts[0]["ids"] == alone["ids"]).float().mean())
            results.ratio(f"{name}, share of ids equal to one process's", same, ">= 1")


def _part(rows: int, dim: int, k: int, rounds: int, gather_below: int = GATHER_BELOW_BYTES) -> dict:
    own = shard_range(rows)
    features = features_of(rows, dim, torch.device("cpu"))[own.start : own.stop].clone()
    groups = torch.arange(rows)
    valid = torch.ones(rows, dtype=torch.bool)

    def find() -> tuple[Tensor, Tensor]:
        return nearest_neighbors(features, k, groups, valid, gather_below_bytes=gather_below)

    return {"seconds": cpu_seconds(find, rounds), "ids": all_gather_variable_rows(find()[0])}
