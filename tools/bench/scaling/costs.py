"""Measured times of the loss and of the nearest-neighbor search, compared with the formulas of their costs.

Legend: N rows of the memory bank or samples, B global batch, D embedding dimension, k neighbors.
"""

from statistics import median
from typing import Any

import torch

from distav.distributed.environment import machine
from tools.bench.knn import random_features, search
from tools.bench.memory_bank import MemoryBankBenchmark
from tools.bench.timing import Setting

ROWS = (8192, 32768, 131072)
BATCHES = (256, 1024, 4096)
NEIGHBOR_ROWS = (10000, 20000, 40000)
BASE_ROWS, BASE_BATCH, DIM, K = 32768, 1024, 128, 200


def loss_operations(batch: int, rows: int, dim: int) -> float:
    """Return the floating-point operations of loss and gradient in both directions, 8 B N D, summed over ranks."""
    return 8.0 * batch * rows * dim


def run(rounds: int) -> dict[str, Any]:
    """Measure several values of N and B with one thread, and return a JSON object.

    Each of its rows has the seconds of a point and their ratio to the formula, whose constant is that of the base point
    or of the first number of samples.

    Args:
        rounds: measured rounds of the loss.
    """
    setting = Setting(torch.device("cpu"), 1, rounds)
    base = _loss_s(setting, BASE_BATCH, BASE_ROWS)
    rate = loss_operations(BASE_BATCH, BASE_ROWS, DIM) / base
    rows = []
    for batch, num_rows in [(BASE_BATCH, size) for size in ROWS] + [(size, BASE_ROWS) for size in BATCHES]:
        seconds = _loss_s(setting, batch, num_rows)
        ratio = seconds * rate / loss_operations(batch, num_rows, DIM)
        rows.append({"point": f"loss + gradient, N={num_rows}, B={batch}", "seconds": seconds, "ratio": ratio})
    per_pair = 0.0
    for num_rows in NEIGHBOR_ROWS:
        features = random_features(num_rows, DIM, setting.device)
        one_round = Setting(setting.device, 1, 1)
        seconds = median(one_round.interleaved({"": lambda features=features: search(features, K)})[""])
        per_pair = per_pair or seconds / num_rows**2
        point = {"point": f"neighbors, N={num_rows}", "seconds": seconds, "ratio": seconds / (per_pair * num_rows**2)}
        rows.append(point)
    arguments = {"dim": DIM, "k": K, "threads": 1, "rounds": rounds}
    return {"machine": machine(), "arguments": arguments, "loss_flops": rate, "rows": rows}


def _loss_s(setting: Setting, batch: int, rows: int) -> float:
    benchmark = MemoryBankBenchmark(batch, rows, DIM, setting.device)
    return median(setting.interleaved({"": benchmark.loss})[""])
