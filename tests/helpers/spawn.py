"""Run a function in several processes with the gloo backend; a rank that hangs or fails is named."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tests.helpers.rank_group import CpuProcess, context


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60) -> list[Any]:
    """Return the results of `function(*arguments)` on all ranks; raises if one fails or does not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        results: Any = context.Queue()
        target = (function, arguments, num_ranks, str(Path(folder) / "rendezvous"), results, timeout_s)
        processes = [CpuProcess(target=_work, args=(rank, *target), daemon=True) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        values: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(values) < num_ranks:
            if results.empty():
                pending = [rank for rank in range(num_ranks) if rank not in values]
                dead = [rank for rank in pending if not processes[rank].is_alive()]
                if time.monotonic() > deadline or (
                    dead and results.empty() and time.monotonic() > deadline - timeout_s + 5
                ):
                    for process in processes:
                        process.kill()
                    raise AssertionError(f"ranks {pending} returned nothing within {timeout_s} s (dead: {dead})")
                time.sleep(0.02)
                continue
            rank, succeeded, value = results.get()
            values[rank] = pickle.loads(value) if succeeded else value
            if not succeeded:
                for process in processes:
                    process.kill()
                raise AssertionError(f"rank {rank} failed:\n{value}")
        for process in processes:
            process.join(10)
        return [values[rank] for rank in range(num_ranks)]


def _work(
    rank: int,
    function: Callable[..., Any],
    arguments: tuple,
    num_ranks: int,
    file: str,
    results: Any,
    timeout_s: float,
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{file}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=timeout_s),
        )
        value = function(*arguments)
        torch.distributed.barrier()
        results.put((rank, True, pickle.dumps(value)))  # By value: the memory of a tensor ends with its process.
        torch.distributed.destroy_process_group()
    except BaseException:  # noqa: BLE001  # raised again in the test
        results.put((rank, False, traceback.format_exc()))
