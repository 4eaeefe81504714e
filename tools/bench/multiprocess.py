"""Benchmarks on several processes of this machine, joined by gloo over the loopback interface."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns on each of some ranks, one CPU thread each."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_ranks) as pool:
            target = str(Path(folder) / "rendezvous")
            work = [
                pool.apply_async(_work, (rank, num_ranks, target, function, arguments)) for rank in range(num_ranks)
            ]
            return [each.get(timeout=1800) for each in work]


def _work(rank: int, num_ranks: int, target: str, function: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{target}", rank=rank, world_size=num_ranks)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def cpu_seconds(work: Callable[[], Any], rounds: int) -> list[float]:
    """Return the CPU time of this process for each round, all its threads together."""
    work()
    seconds = []
    for _ in range(rounds):
        if dist.is_initialized():
            dist.barrier()
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return seconds


def loopback_bytes() -> int:
    """Return the bytes that went over the loopback interface since it came up, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.partition(":")[2].split()[0])
    raise OSError("/proc/net/dev shows no loopback interface")
