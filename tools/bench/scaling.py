"""What a step costs as the bank, the batch and the ranks grow: the formulas, and measured points beside them.

Legend: N bank rows, B global batch, W ranks, D width, k neighbours.
"""

from statistics import median

from tools.bench.knn import features_of, search
from tools.bench.memory_bank import MemoryBankBenchmark, sharded_part
from tools.bench.multiprocess import on_ranks
from tools.bench.timing import Results, Setting

ROWS = (8192, 32768, 131072)
BATCHES = (256, 1024, 4096)
NEIGHBOR_ROWS = (10000, 20000, 40000)
BASE_ROWS = 32768
RING = (1, 2, 4)
K = 200
H200_FLOPS, LINK_BYTES = 790e12, 50e9


def loss_operations(batch: int, rows: int, dim: int) -> float:
    """Return the floating-point operations of loss and gradient in both directions, on all ranks together."""
    return 8.0 * batch * rows * dim


def bank_bytes(rows: int, dim: int, bytes_per_number: int = 4) -> float:
    """Return the size of the rows of both modalities, on all ranks together."""
    return 2.0 * rows * dim * bytes_per_number


def loss_wire_bytes(batch: int, ranks: int, dim: int) -> float:
    """Return the bytes that the loss of a sharded bank puts on the wire, on all ranks together; N is not in it.

    Queries are gathered, parts of two softmaxes exchanged, and bank rows fetched where another rank owns them.
    """
    gathered = (ranks - 1) * batch * (4 * (2 * dim + 1) + 8)
    parts = (ranks - 1) * batch * 2 * (dim + 1) * 4
    return gathered + parts + batch * (ranks - 1) / ranks * 2 * dim * 4


def run(setting: Setting, batch: int, dim: int) -> Results:
    """Measure a few sizes of each.

    Args:
        setting: device, threads, rounds.
        batch, dim: B and D where they do not vary.
    """
    results = Results("scaling", {"batch": batch, "dim": dim, "k": K, "threads": setting.threads})
    base = _seconds(setting, batch, BASE_ROWS, dim)
    rate = loss_operations(batch, BASE_ROWS, dim) / base
    results.note("rate of loss + gradient at the base point", rate / 1e9, "GFLOP/s")
    for rows in ROWS:
        _point(results, f"N={rows}, B={batch}", _seconds(setting, batch, rows, dim), batch, rows, dim, rate)
    for size in BATCHES:
        _point(results, f"B={size}, N={BASE_ROWS}", _seconds(setting, size, BASE_ROWS, dim), size, BASE_ROWS, dim, rate)
    for ranks in RING[1:]:
        parts = on_ranks(ranks, sharded_part, batch, BASE_ROWS, dim, 1)
        results.note(f"W={ranks}, bytes of a step", parts[0]["bytes"], "bytes")
        results.ratio(f"W={ranks}, bytes / formula", parts[0]["bytes"] / loss_wire_bytes(batch, ranks, dim))
    per_pair = 0.0
    for rows in NEIGHBOR_ROWS:
        features = features_of(rows, dim, setting.device)
        few = Setting(setting.device, setting.threads, 1)
        seconds = median(few.interleaved({"": lambda features=features: search(features, K)})[""])
        per_pair = per_pair or seconds / rows**2
        results.note(f"neighbours, N={rows}", seconds, "s")
        results.ratio(f"neighbours, N={rows}, time / N^2 from the first point", seconds / (per_pair * rows**2))
    _plan(results)
    return results


def _seconds(setting: Setting, batch: int, rows: int, dim: int) -> float:
    problem = MemoryBankBenchmark(batch, rows, dim, setting.device)
    return median(setting.interleaved({"": problem.loss})[""])


def _point(results: Results, name: str, seconds: float, batch: int, rows: int, dim: int, rate: float) -> None:
    results.note(f"loss + gradient, {name}", 1000 * seconds, "ms")
    results.ratio(f"loss + gradient, {name}, time / formula", seconds * rate / loss_operations(batch, rows, dim))


def _plan(results: Results) -> None:
    """Work out the formulas for 1,024 GPUs and a hundred million clips."""
    rows, ranks, per_rank, dim, width = 10**8, 1024, 64, 128, 256
    batch = ranks * per_rank
    wire = loss_wire_bytes(batch, ranks, dim) / ranks
    results.note("plan: bank rows of a GPU in float32", bank_bytes(rows, dim) / ranks / 2**20, "MiB")
    results.note("plan: their bfloat16 copy", bank_bytes(rows, dim, 2) / ranks / 2**20, "MiB")
    flops = loss_operations(batch, rows, dim) / ranks
    results.note("plan: loss of a step, operations of a GPU", flops / 1e12, "TFLOP")
    results.note("plan: the same at 790 TFLOP/s", 1000 * flops / H200_FLOPS, "ms")
    results.note("plan: bytes on the wire of a GPU a step", wire / 2**20, "MiB")
    results.note("plan: the same at 50 GB/s", 1000 * wire / LINK_BYTES, "ms")
    pairs = 2.0 * rows**2 * width / ranks
    results.note("plan: neighbours, operations of a GPU, D=256", pairs / 1e15, "PFLOP")
    results.note("plan: the same at 790 TFLOP/s ", pairs / H200_FLOPS, "s")
    ring = rows * width * 4.0 * (ranks - 1) / ranks
    results.note("plan: neighbours, bytes round the ring of a GPU", ring / 2**30, "GiB")
    results.note("plan: the same at 50 GB/s ", ring / LINK_BYTES, "s")
