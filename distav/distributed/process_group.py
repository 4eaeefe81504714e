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
from distav.distributed.launch import Launch
from distav.distributed.rendezvous import rendezvous

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BLOCK_BYTES, _MAX_KEPT_BYTES = 64 << 20, 512 << 20


@dataclass(frozen=True)
class World:
    """This process within the process group.

    Attributes:
        rank: number of this process, 0..world_size-1.
        world_size: number of processes.
        local_rank: number of this process on its machine.
        device: where it computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and log lines."""
        return self.rank == 0


@contextlib.contextmanager
def process_group(device: str, timeout_s: float, threads_per_rank: int = 0) -> Iterator[World]:
    """Create the process group that the launcher describes in the environment; without a launcher, one of size 1.

    On a GPU, cuDNN measures its algorithms at the first batch of each shape and keeps the fastest. The choice may
    differ between starts, so a run that resumes on a GPU continues up to floating-point rounding; on a CPU it continues
    bit for bit.

    Args:
        device: auto, gpu or cpu.
        timeout_s: seconds after which the watchdog reports a stalled rank and ends all ranks.
        threads_per_rank: CPU threads of this process; 0 divides the cores among the ranks of the machine.

    Raises:
        UserError: if a GPU is requested and there is none for this rank, or the launcher's variables are invalid.
    """
    launch = Launch.from_environment()
    local_rank = launch.local_rank
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed reads it.
    on_gpu = device == "gpu" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"run.device={device}: rank {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found); "
            "start fewer ranks (deepspeed --num_gpus), let each rank use all GPUs of its machine (srun without "
            "--gpus-per-task), or set run.device=cpu."
        )
    target = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(target)
        torch.backends.cudnn.benchmark = True
        # NCCL ends the process if CUDA does not respond for 8 minutes; the watchdog of distav names the rank at fault.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(max(480, int(2 * timeout_s))))
    else:
        _keep_freed_memory()
    torch.set_num_threads(threads_per_rank or launch.cores_per_rank)
    # The watchdog acts first: it names the rank at fault; a collective reports only a timeout.
    backend, timeout = "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timedelta(seconds=1.5 * timeout_s)
    if launch.world_size > 1:
        with rendezvous(launch, timeout_s) as store:
            dist.init_process_group(
                backend, timeout=timeout, store=store, rank=launch.rank, world_size=launch.world_size
            )
            yield World(launch.rank, launch.world_size, local_rank, target)
        barrier()  # The store ends with rank 0.
        dist.destroy_process_group()
    else:  # A store without a port: another process cannot take it.
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield World(0, 1, local_rank, target)
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def core_for_loading(needed: bool) -> Iterator[None]:
    """Context in which PyTorch leaves a core of this rank to the thread that decodes clips, if that is needed."""
    threads = torch.get_num_threads()
    if needed:
        torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Let glibc reuse freed activations instead of returning them to the operating system at every step.

    New pages cost a small network on a CPU a quarter to a third of its time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAX_KEPT_BLOCK_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _MAX_KEPT_BYTES)
