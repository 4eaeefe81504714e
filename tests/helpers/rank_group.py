"""Runs of several ranks without a launcher, which tests kill, stop and start again in quick succession.

Ranks are forked from a server that has imported everything, so that a start takes a second instead of a minute. They
compute on the CPU: a forked process cannot use CUDA after its parent has initialized it.
"""

import hashlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import safetensors.torch

_PRELOADED = [
    "distav.train",
    "distav.training.run",
    "distav.training.phases.registry",
    "distav.training.report",
    "deepspeed",
]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(_PRELOADED)


class CpuProcess(ForkServerProcess):
    """A process that is forked from the server; DeepSpeed uses the CPU in it."""

    def start(self) -> None:
        with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # The server may start here.
            super().start()


class RankGroup:
    """The ranks of one start of a run."""

    started: ClassVar[list["RankGroup"]] = []

    def __init__(
        self,
        num_ranks: int,
        arguments: Sequence[str],
        folder: Path,
        before: Callable[[int], None] | None = None,
        module: str = "distav.train",
    ):
        """Start `main` of a module in every rank after `before(rank)`; the output goes to files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
        self.processes = [
            CpuProcess(
                target=_rank, args=(rank, num_ranks, port, tuple(arguments), str(self.logs[rank]), before, module)
            )
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()
        RankGroup.started.append(self)

    @classmethod
    def kill_all(cls) -> None:
        """Kill every rank of every group, stopped ones too."""
        for group in cls.started:
            group.signal(signal.SIGKILL)
            for process in group.processes:
                process.join()
        cls.started.clear()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid or 0, number)

    def wait(self, timeout_s: float = 120) -> list[int | None]:
        """Return the exit statuses; ranks that have not ended by then are killed and have None."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return statuses

    def output(self) -> str:
        """Return the output of all ranks."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 90) -> None:
        """Wait until a condition holds; fails if all ranks end before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"condition not met within {timeout_s} s:\n{self.output()[-4000:]}"
            assert any(process.is_alive() for process in self.processes), self.output()[-4000:]
            time.sleep(0.01)


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    arguments: Sequence[str],
    log: str,
    before: Callable[[int], None] | None,
    module: str,
) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if before:
        before(rank)
    cpu = ["run.device=cpu", "run.threads_per_rank=1"] if module == "distav.train" else ["--device=cpu", "--threads=1"]
    sys.exit(importlib.import_module(module).main([*arguments, *cpu]))


def run_to_completion(
    num_ranks: int, arguments: Sequence[str], folder: Path, timeout_s: float = 180, module: str = "distav.train"
) -> RankGroup:
    """Run to completion and check the exit status of every rank."""
    group = RankGroup(num_ranks, arguments, folder, module=module)
    assert group.wait(timeout_s) == [0] * num_ranks, group.output()[-6000:]
    return group


def last_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def fingerprint(run: Path) -> dict[str, str]:
    """Return a digest of every tensor in the last checkpoint: weights, optimizer state, bank rows and columns."""
    digests = {}
    for path in sorted(last_checkpoint(run).glob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(path).items():
            digests[f"{path.name}:{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return digests
