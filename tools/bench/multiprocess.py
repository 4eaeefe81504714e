"""Benchmarks on several processes of one machine, connected by gloo over the loopback interface."""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 1800) -> list[Any]:
    """Return the result of `function(*arguments)` of each rank; every rank has one CPU thread."""
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_ranks) as pool:
            rendezvous = str(Path(directory) / "rendezvous")
            pending = [
                pool.apply_async(_run, (rank, num_ranks, rendezvous, function, arguments)) for rank in range(num_ranks)
            ]
            return [result.get(timeout=timeout_s) for result in pending]


def _run(rank: int, num_ranks: int, rendezvous: str, function: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def cpu_seconds(function: Callable[[], Any], rounds: int) -> list[float]:
    """Return the CPU time of this process, summed over its threads, for each round after one warm-up round."""
    function()
    seconds = []
    for _ in range(rounds):
        if dist.is_initialized():
            dist.barrier()
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return seconds


def loopback_bytes() -> int:
    """Return the bytes sent over the loopback interface since it was started, headers included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.partition(":")[2].split()[0])
    raise OSError("/proc/net/dev has no loopback interface")
