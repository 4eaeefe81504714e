"""The ranks of a run: start-up, the few collectives we use, and agreement between ranks.

Every function also works in a single process without torch.distributed, where it is the identity.
Legend: W ranks, b rows on this rank, B rows on all ranks.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distav.config.errors import UserError
from distav.rendezvous import mark, met

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT, _MOST_KEPT = 64 << 20, 512 << 20


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    num_ranks: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and lines for all."""
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str, timeout_s: float, threads_per_rank: int = 0) -> Iterator[World]:
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
        with met(timeout_s) as (store, at, of):
            dist.init_process_group(backend, timeout=timeout, store=store, rank=at, world_size=of)
            yield World(at, of, local_rank, target)
        wait_for_all()  # The first rank takes the store along when it goes.
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


def num_ranks() -> int:
    """Return the number of ranks W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this rank, 0..W-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order: [b, ...] -> [B, ...]; b is the same everywhere, no gradient."""
    rows = rows.detach().contiguous()
    if num_ranks() == 1:
        return rows
    mark("gathering rows")
    parts = [torch.empty_like(rows) for _ in range(num_ranks())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def gather_ragged_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order where ranks hold different numbers of rows; no gradient."""
    if num_ranks() == 1:
        return rows.detach()
    sizes = gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    whole = gather_rows(padded).view(num_ranks(), max(sizes), *rows.shape[1:])
    return torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])


def own_rows(whole: Tensor) -> Tensor:
    """Return this rank's part of rows gathered by `gather_rows`: [B, ...] -> [b, ...]."""
    size = len(whole) // num_ranks()
    return whole[rank() * size : (rank() + 1) * size]


def own_share(whole: Tensor) -> Tensor:
    """Return the rows that this rank takes of what all ranks hold: [N, ...] -> [n, ...], those of `row_range(N)`."""
    rows = row_range(len(whole))
    return whole[rows.start : rows.stop]


def exchange(rows: Tensor, to: Sequence[int] | None = None, of: Sequence[int] | None = None) -> Tensor:
    """Send a part of the rows to each rank and return what the ranks sent here, in rank order; no gradient.

    Args:
        rows: [s, ...], the parts in rank order.
        to: rows that go to each rank; equal parts where None.
        of: rows that come from each rank; as many as are sent to it where None.
    """
    if num_ranks() == 1:
        return rows
    mark("exchanging rows")
    rows = rows.detach().contiguous()
    came = rows.new_empty(sum(of) if of is not None else len(rows), *rows.shape[1:])
    dist.all_to_all_single(came, rows, of and list(of), to and list(to))
    return came


def sum_(values: Tensor) -> Tensor:
    """Add up a tensor over ranks, in place; no gradient."""
    if num_ranks() > 1:
        mark("adding up")
        dist.all_reduce(values)
    return values


def max_(values: Tensor) -> Tensor:
    """Take the maximum of a tensor over ranks, in place; no gradient."""
    if num_ranks() > 1:
        mark("agreeing")
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class _Sum(torch.autograd.Function):
    """A sum over ranks whose backward sums too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_(gradients[0].clone())


def sum_across(values: Tensor) -> Tensor:
    """Add up a tensor over ranks with gradient.

    Every rank computes the same loss from the sum, and gradients are averaged over ranks afterwards, so the backward
    sums: that gives the gradient of one process that held all rows.
    """
    return _Sum.apply(values) if num_ranks() > 1 else values  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    """Rows of all ranks, whose backward adds up what every rank has for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return exchange(gradients[0]).view(num_ranks(), -1, *gradients[0].shape[1:]).sum(0)


def gather_across(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order with gradient: [b, ...] -> [B, ...]; b is the same everywhere.

    A rank's loss has gradients by the rows of others; they are added up where the rows came from.
    """
    return _Gather.apply(rows) if num_ranks() > 1 else rows  # pyright: ignore[reportReturnType]


def any_rank(flag: bool) -> bool:
    """Whether any rank says yes; all ranks get the same answer."""
    return bool(max_(torch.tensor([float(flag)])).item())


def broadcast(value: Any, source: int = 0) -> Any:
    """Return what one rank holds to all ranks (picklable, trusted values only)."""
    if num_ranks() == 1:
        return value
    mark("telling all ranks")
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def on_main(work: Callable[[], None]) -> None:
    """Let the main rank do something, and all ranks know if it could not.

    Raises:
        UserError: what the main rank met, on every rank.
    """
    problem = ""
    if rank() == 0:
        try:
            work()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}; choose another --out, or mend it."
    if problem := broadcast(problem):
        raise UserError(problem)


def gather_objects(value: Any) -> list[Any]:
    """Return what every rank holds, in rank order, to all ranks (picklable, trusted values only)."""
    if num_ranks() == 1:
        return [value]
    mark("asking all ranks")
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if num_ranks() > 1:
        sum_(torch.zeros(1))


def passing_shards(rows: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of every rank in turn, this rank's own first; the next ones travel while these are used.

    Args:
        rows: [n, ...] of this rank.
        sizes: number of rows of each rank.

    Yields:
        The owner and its rows. A rank sends (W - 1) shards and receives as many.
    """
    world, me = num_ranks(), rank()
    current = rows.contiguous()
    for step in range(world):
        owner = (me - step) % world
        waiting, coming = [], current
        mark("passing rows on")
        if step + 1 < world:
            coming = rows.new_empty(sizes[(owner - 1) % world], *rows.shape[1:])
            transfers = [
                dist.P2POp(dist.isend, current, (me + 1) % world),
                dist.P2POp(dist.irecv, coming, (me - 1) % world),
            ]
            waiting = dist.batch_isend_irecv([each for each in transfers if each.tensor.numel()])
        yield owner, current
        for transfer in waiting:
            transfer.wait()
        current = coming


def row_range(num_rows: int, owner: int | None = None, owners: int | None = None) -> range:
    """Return the contiguous ids that a rank owns out of 0..num_rows-1; sizes differ by one at most."""
    of, at = owners or num_ranks(), rank() if owner is None else owner
    return range(num_rows * at // of, num_rows * (at + 1) // of)
