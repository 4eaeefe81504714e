"""Trainings of several ranks without a launcher, to be killed, stopped and started again in quick succession.

Ranks are forked from a server that has imported everything, so that a start takes a second and not a minute. They
compute on the CPU: what is forked cannot use a GPU that its parent has asked for.
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
from multiprocessing import forkserver
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


def new_process(target: Callable[..., None], *arguments: Any, daemon: bool = False) -> ForkServerProcess:
    """Return a process, not yet started, that is forked from the server; DeepSpeed takes the CPU there."""
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        forkserver.ensure_running()
    return context.Process(target=target, args=arguments, daemon=daemon)


class Team:
    """The ranks of one start of a run."""

    started: ClassVar[list["Team"]] = []

    def __init__(
        self,
        num_ranks: int,
        arguments: Sequence[str],
        folder: Path,
        before: Callable[[int], None] | None = None,
        module: str = "distav.train",
    ):
        """Start `main` of a module; what the ranks say goes to `folder`, `before` is called in each rank first."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [folder / f"rank-{rank}.log" for rank in range(num_ranks)]
        self.ranks = [
            new_process(_rank, rank, num_ranks, port, tuple(arguments), str(self.logs[rank]), before, module)
            for rank in range(num_ranks)
        ]
        for each in self.ranks:
            each.start()
        Team.started.append(self)

    @classmethod
    def kill_all(cls) -> None:
        """Kill every rank of every team, stopped ones too."""
        for team in cls.started:
            team.signal(signal.SIGKILL)
            for each in team.ranks:
                each.join()
        cls.started.clear()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank or to all."""
        for each in self.ranks if rank is None else [self.ranks[rank]]:
            if each.is_alive():
                os.kill(each.pid or 0, number)

    def end(self, timeout_s: float = 120) -> list[int | None]:
        """Return the exit statuses; ranks that have not ended by then are killed and have None."""
        deadline = time.monotonic() + timeout_s
        for each in self.ranks:
            each.join(max(0.0, deadline - time.monotonic()))
        statuses = [each.exitcode for each in self.ranks]
        self.signal(signal.SIGKILL)
        for each in self.ranks:
            each.join()
        return statuses

    def said(self) -> str:
        """Return what all ranks said."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def wait_for(self, happened: Callable[[], Any], timeout_s: float = 90) -> None:
        """Wait until something has happened, while the ranks live."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            assert time.monotonic() < deadline, f"nothing happened in {timeout_s} s:\n{self.said()[-4000:]}"
            assert any(each.is_alive() for each in self.ranks), self.said()[-4000:]
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


def run_whole(
    num_ranks: int, arguments: Sequence[str], folder: Path, timeout_s: float = 180, module: str = "distav.train"
) -> Team:
    """Run to the end."""
    team = Team(num_ranks, arguments, folder, module=module)
    assert team.end(timeout_s) == [0] * num_ranks, team.said()[-6000:]
    return team


def last_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def fingerprint(run: Path) -> dict[str, str]:
    """Digest of every tensor in the last checkpoint: weights, optimiser state, bank rows, visits of every sample."""
    found = {}
    for path in sorted(last_checkpoint(run).glob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(path).items():
            found[f"{path.name}:{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return found
