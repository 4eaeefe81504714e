"""Cost of a step for growing memory bank, batch and number of ranks: formulas and measured points.

Legend: N rows of the memory bank, B global batch, W ranks, D embedding dimension, k neighbors.
"""

from statistics import median

from tools.bench.knn import random_features, search
from tools.bench.memory_bank import MemoryBankBenchmark, exchanged_bytes, sharded_loss
from tools.bench.multiprocess import run_on_ranks
from tools.bench.timing import Results, Setting

ROWS = (8192, 32768, 131072)
BATCHES = (256, 1024, 4096)
NEIGHBOR_ROWS = (10000, 20000, 40000)
BASE_ROWS = 32768
RANKS = (2, 4)
K = 200
H200_FLOPS, LINK_BYTES = 790e12, 50e9


def loss_operations(batch: int, rows: int, dim: int) -> float:
    """Return the floating-point operations of loss and gradient in both directions, summed over ranks."""
    return 8.0 * batch * rows * dim


def bank_bytes(rows: int, dim: int, bytes_per_number: int = 4) -> float:
    """Return the size of the memory bank rows of both modalities, summed over ranks."""
    return 2.0 * rows * dim * bytes_per_number


def loss_wire_bytes(batch: int, ranks: int, dim: int) -> float:
    """Return the bytes sent by the loss over a sharded memory bank, summed over ranks; they do not depend on N.

    Queries are gathered, partial results of two softmaxes are exchanged, and bank rows are fetched from their owners.
    """
    return exchanged_bytes(batch, ranks, dim) + batch * (ranks - 1) / ranks * 2 * dim * 4


def run(setting: Setting, batch: int, dim: int) -> Results:
    """Measure several values of N, B, W and of the number of samples searched for neighbors.

    Args:
        setting: device, threads, rounds.
        batch: B where it does not vary.
        dim: D.
    """
    results = Results("scaling", {"batch": batch, "dim": dim, "k": K, "threads": setting.threads})
    base = _seconds(setting, batch, BASE_ROWS, dim)
    rate = loss_operations(batch, BASE_ROWS, dim) / base
    results.add_value("rate of loss + gradient at the base point", rate / 1e9, "GFLOP/s")
    for rows in ROWS:
        _add_point(results, f"N={rows}, B={batch}", _seconds(setting, batch, rows, dim), batch, rows, dim, rate)
    for size in BATCHES:
        _add_point(
            results, f"B={size}, N={BASE_ROWS}", _seconds(setting, size, BASE_ROWS, dim), size, BASE_ROWS, dim, rate
        )
    for ranks in RANKS:
        parts = run_on_ranks(ranks, sharded_loss, batch, BASE_ROWS, dim, 1)
        results.add_value(f"W={ranks}, bytes per step", parts[0]["bytes"], "bytes")
        results.add_ratio(f"W={ranks}, bytes / formula", parts[0]["bytes"] / loss_wire_bytes(batch, ranks, dim))
    per_pair = 0.0
    for rows in NEIGHBOR_ROWS:
        features = random_features(rows, dim, setting.device)
        one_round = Setting(setting.device, setting.threads, 1)
        seconds = median(one_round.interleaved({"": lambda features=features: search(features, K)})[""])
        per_pair = per_pair or seconds / rows**2
        results.add_value(f"neighbors, N={rows}", seconds, "s")
        results.add_ratio(f"neighbors, N={rows}, time / N^2 from the first point", seconds / (per_pair * rows**2))
    _add_plan(results)
    return results


def _seconds(setting: Setting, batch: int, rows: int, dim: int) -> float:
    benchmark = MemoryBankBenchmark(batch, rows, dim, setting.device)
    return median(setting.interleaved({"": benchmark.loss})[""])


def _add_point(results: Results, name: str, seconds: float, batch: int, rows: int, dim: int, rate: float) -> None:
    results.add_value(f"loss + gradient, {name}", 1000 * seconds, "ms")
    results.add_ratio(f"loss + gradient, {name}, time / formula", seconds * rate / loss_operations(batch, rows, dim))


def _add_plan(results: Results) -> None:
    """Evaluate the formulas for 1,024 GPUs and a hundred million clips."""
    rows, ranks, per_rank, dim, feature_dim = 10**8, 1024, 64, 128, 256
    batch = ranks * per_rank
    wire = loss_wire_bytes(batch, ranks, dim) / ranks
    results.add_value("plan: memory bank rows per GPU, float32", bank_bytes(rows, dim) / ranks / 2**20, "MiB")
    results.add_value("plan: memory bank rows per GPU, bfloat16 copy", bank_bytes(rows, dim, 2) / ranks / 2**20, "MiB")
    flops = loss_operations(batch, rows, dim) / ranks
    results.add_value("plan: loss, operations per GPU and step", flops / 1e12, "TFLOP")
    results.add_value("plan: loss, time per step at 790 TFLOP/s", 1000 * flops / H200_FLOPS, "ms")
    results.add_value("plan: loss, bytes on the wire per GPU and step", wire / 2**20, "MiB")
    results.add_value("plan: loss, transfer time per step at 50 GB/s", 1000 * wire / LINK_BYTES, "ms")
    pairs = 2.0 * rows**2 * feature_dim / ranks
    results.add_value("plan: neighbors, operations per GPU, D=256", pairs / 1e15, "PFLOP")
    results.add_value("plan: neighbors, time at 790 TFLOP/s", pairs / H200_FLOPS, "s")
    ring = rows * feature_dim * 4.0 * (ranks - 1) / ranks
    results.add_value("plan: neighbors, ring exchange per GPU", ring / 2**30, "GiB")
    results.add_value("plan: neighbors, ring exchange time at 50 GB/s", ring / LINK_BYTES, "s")
