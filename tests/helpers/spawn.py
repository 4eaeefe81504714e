"""Run a function in several gloo processes; a rank that hangs or fails is named."""

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

from tests.helpers.team import context, new_process


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60) -> list[Any]:
    """Return what `function(*arguments)` returns on each rank; raises where one fails or does not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        results: Any = context.Queue()
        target = (function, arguments, num_ranks, str(Path(folder) / "rendezvous"), results, timeout_s)
        processes = [new_process(_work, rank, *target, daemon=True) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < num_ranks:
            if results.empty():
                silent = [rank for rank in range(num_ranks) if rank not in answers]
                dead = [rank for rank in silent if not processes[rank].is_alive()]
                if time.monotonic() > deadline or (
                    dead and results.empty() and time.monotonic() > deadline - timeout_s + 5
                ):
                    for process in processes:
                        process.kill()
                    raise AssertionError(f"ranks {silent} gave no answer within {timeout_s} s (dead: {dead})")
                time.sleep(0.02)
                continue
            rank, good, value = results.get()
            answers[rank] = pickle.loads(value) if good else value
            if not good:
                for process in processes:
                    process.kill()
                raise AssertionError(f"rank {rank} failed:\n{value}")
        for process in processes:
            process.join(10)
        return [answers[rank] for rank in range(num_ranks)]


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
        results.put((rank, True, pickle.dumps(value)))  # by value; a tensor's memory goes with its process
        torch.distributed.destroy_process_group()
    except BaseException:  # noqa: BLE001  # told to the test that waits
        results.put((rank, False, traceback.format_exc()))
