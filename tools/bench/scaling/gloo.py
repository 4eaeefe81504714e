"""Times of gloo's collectives between processes of this machine, and the network that is fitted to them.

The collectives alternate with computations, as in a training step. Computations replace the contents of the caches and
do not end at the same time on all ranks, so a collective takes longer than in a loop of its own.
Legend: W ranks, V bytes of a collective as in `Network.seconds`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from distav.distributed.collectives import all_gather_rows, all_reduce_sum_, all_to_all_rows, barrier
from tools.bench.multiprocess import run_on_ranks
from tools.bench.scaling.network import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    KINDS,
    REDUCE_SCATTER,
    Link,
    Network,
    ring_messages,
    wire_bytes,
)

SIZES = (64, 1024, 16384, 131072, 1048576, 4194304)
"""Sizes V of the measured collectives."""
RANKS = (2, 4)
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
"""Function of torch.distributed that scatters sums of one tensor; newer versions of PyTorch have renamed it."""
REPETITIONS = 60
SHORTEST_S = 1e-6
"""Least time of a collective: the difference of two measured times can be negative."""


@dataclass(frozen=True)
class CollectiveTime:
    """Measured time of a collective.

    Attributes:
        kind: one of `tools.bench.scaling.network.KINDS`.
        num_bytes: V.
        world_size: W.
        seconds: mean time by which it prolongs a computation that precedes it.
    """

    kind: str
    num_bytes: int
    world_size: int
    seconds: float


def measure() -> list[CollectiveTime]:
    """Measure all kinds and sizes of collectives with 2 and 4 ranks."""
    return [point for ranks in RANKS for point in run_on_ranks(ranks, _measure_rank)[0]]


def _measure_rank() -> list[CollectiveTime]:
    world_size, compute = dist.get_world_size(), _computation()
    points = []
    for num_bytes in SIZES:
        for kind, run in _collectives(num_bytes // 4, world_size).items():
            repetitions = REPETITIONS if num_bytes < 2**20 else REPETITIONS // 3
            alone, together = (_mean_s(calls, repetitions) for calls in ([compute], [compute, run]))
            points.append(CollectiveTime(kind, num_bytes, world_size, max(together - alone, SHORTEST_S)))
    return points


def _mean_s(functions: Sequence[Callable[[], Any]], repetitions: int) -> float:
    """Return the mean time of calling functions in turn, on all ranks at the same time."""
    for function in functions:
        function()
    barrier()
    started = time.perf_counter()
    for _ in range(repetitions):
        for function in functions:
            function()
    return (time.perf_counter() - started) / repetitions


def _computation() -> Callable[[], Any]:
    """Return a computation like that between two batch normalizations: a convolution and a sum of 4 MiB."""
    layer, images = torch.nn.Conv2d(16, 16, 3, padding=1), torch.randn(16, 16, 48, 48)
    first, second = torch.randn(2, 2**20)

    @torch.no_grad()
    def compute() -> None:
        layer(images)
        torch.add(first, second).relu_()

    return compute


def _collectives(numbers: int, world_size: int) -> dict[str, Callable[[], Any]]:
    values, part = torch.ones(numbers), torch.ones(numbers // world_size)
    return {
        ALL_REDUCE: lambda: all_reduce_sum_(values.zero_()),
        ALL_GATHER: lambda: all_gather_rows(part),
        REDUCE_SCATTER: lambda: getattr(dist, _REDUCE_SCATTER)(part, values),
        ALL_TO_ALL: lambda: all_to_all_rows(values),
    }


def fastest(rounds: Iterable[Sequence[CollectiveTime]]) -> list[CollectiveTime]:
    """Return each point with its shortest time over the rounds, which other load has disturbed least."""
    return [replace(points[0], seconds=min(point.seconds for point in points)) for points in zip(*rounds, strict=True)]


def fit(points: Sequence[CollectiveTime], cores: int) -> dict[str, Network]:
    """Fit start, latency and bandwidth of each kind of collective, by least squares of the relative errors.

    Ranks that share cores handle their messages one after the other, so latency and transfer time are proportional to
    W / cores if that is above 1. A time is start + sharing (messages latency + bytes / bandwidth).

    Args:
        points: measured times.
        cores: cores of the machine.
    """
    networks = {}
    for kind in KINDS:
        chosen = [point for point in points if point.kind == kind]
        rows = np.array([_row(point, cores) for point in chosen])
        seconds = np.array([point.seconds for point in chosen])
        start, latency, per_byte = nnls(rows / seconds[:, None], np.ones(len(chosen)))[0]
        link = Link(float(latency), 1 / max(float(per_byte), 1e-15))
        networks[kind] = Network(ranks_per_node=2**20, within=link, between=link, start_s=float(start))
    return networks


def _row(point: CollectiveTime, cores: int) -> list[float]:
    sharing = max(1.0, point.world_size / cores)
    messages = ring_messages(point.kind, point.world_size)
    return [1.0, sharing * messages, sharing * wire_bytes(point.kind, point.num_bytes, point.world_size)]


def shared(network: Network, world_size: int, cores: int) -> Network:
    """Return the network of W ranks that share the cores of the machine."""
    sharing = max(1.0, world_size / cores)
    link = Link(network.within.latency_s * sharing, network.within.bandwidth / sharing)
    return replace(network, within=link, between=link)


def relative_errors(networks: dict[str, Network], points: Sequence[CollectiveTime], cores: int) -> list[float]:
    """Return |fitted / measured - 1| of each point."""
    errors = []
    for point in points:
        network = shared(networks[point.kind], point.world_size, cores)
        errors.append(abs(network.seconds(point.kind, point.num_bytes, point.world_size) / point.seconds - 1))
    return errors


def as_dict(networks: dict[str, Network]) -> dict[str, dict[str, Any]]:
    """Return the networks as JSON objects."""
    return {kind: asdict(network) for kind, network in networks.items()}
