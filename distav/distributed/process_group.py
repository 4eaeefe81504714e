"""The process group of a run: device, threads and backend of each rank."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distav.config.errors import UserError
from distav.distributed.collectives import barrier
from distav.distributed.rendezvous import rendezvous

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


_LARGEST_KEPT, _MOST_KEPT = 64 << 20, 512 << 20


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and lines for all."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(device: str, timeout_s: float, threads_per_rank: int = 0) -> Iterator[World]:
    """Join the process group that the launcher describes in the environment; alone, be a world of one.

    On a GPU, cuDNN measures its algorithms at the first batch of each shape and keeps the fastest. Which one wins may
    differ from start to start, so a run that is resumed on a GPU goes on to the same numbers up to rounding; on a CPU,
    to the same bits.

    Args:
        device: auto, gpu or cpu.
        timeout_s: seconds after which a rank that keeps the others waiting is named, and all of them end.
        threads_per_rank: CPU threads of this process; 0 shares the cores among the ranks of the machine.

    Raises:
        UserError: where a GPU is asked for and there is none for this rank.
    """
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    local_size = int(
        os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", "1")))
    )
    on_gpu = device == "gpu" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"run.device={device}: rank {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found); "
            "start fewer ranks (deepspeed --num_gpus) or set run.device=cpu."
        )
    target = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
        torch.backends.cudnn.benchmark = True
        # NCCL ends the process where its own watch gets no answer of CUDA for 8 minutes; ours names the rank at fault.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(480, int(2 * timeout_s))))
    else:
        _keep_freed_memory()
    torch.set_num_threads(threads_per_rank or max(1, len(os.sched_getaffinity(0)) // max(1, local_size)))
    # The watch comes first: it knows who is at fault, a collective only that it took too long.
    backend, timeout = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timedelta(seconds=1.5 * timeout_s)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with rendezvous(timeout_s) as (store, at, of):
            dist.init_process_group(backend, timeout=timeout, store=store, rank=at, world_size=of)
            yield World(at, of, local_rank, target)
        barrier()  # The first rank takes the store along when it goes.
        dist.destroy_process_group()
    else:  # Alone, and without a port that another process might take first.
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield World(0, 1, local_rank, target)
        finally:
            dist.destroy_process_group()


def collective_timeout() -> timedelta:
    """Return the timeout of collectives in the process group that `joined` made."""
    group = dist.distributed_c10d._get_default_group()
    return group._get_backend(torch.device("cpu")).options._timeout


def _keep_freed_memory() -> None:
    """Let glibc hand out freed activations again, not give them back to the system at every step.

    Fresh pages cost a small network on a CPU a quarter to a third of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
