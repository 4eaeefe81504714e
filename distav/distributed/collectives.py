"""Collectives of a run, and the division of rows among ranks.

Every function also works in a single process without torch.distributed, where it is the identity.
Legend: W world size, b rows of this rank, B rows of all ranks.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distav.config.errors import UserError
from distav.distributed.rendezvous import record_collective

T = TypeVar("T")
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""Function of torch.distributed that gathers into one tensor; newer versions of PyTorch have renamed it."""
_POLL_S = 0.1


def get_world_size() -> int:
    """Return the world size W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return the rank of this process, 0..W-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, no gradient: [b, ...] -> [B, ...]; b is equal everywhere."""
    rows = rows.detach().contiguous()
    if get_world_size() == 1:
        return rows
    record_collective("all_gather")
    gathered = rows.new_empty(get_world_size() * len(rows), *rows.shape[1:])
    gather = getattr(dist, _ALL_GATHER)  # With a list of tensors, NCCL would launch a copy for each rank.
    gather(gathered, rows)
    return gathered


def all_gather_variable_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, without gradient; ranks may hold different numbers of rows."""
    if get_world_size() == 1:
        return rows.detach()
    sizes = all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    gathered = all_gather_rows(padded).view(get_world_size(), max(sizes), *rows.shape[1:])
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


def local_batch(rows: Tensor) -> Tensor:
    """Return this rank's rows of a tensor that `all_gather_rows` returned: [B, ...] -> [b, ...]."""
    size = len(rows) // get_world_size()
    return rows[get_rank() * size : (get_rank() + 1) * size]


def local_shard(rows: Tensor) -> Tensor:
    """Return the rows that this rank owns of a tensor that all ranks hold, `shard_range(N)`: [N, ...] -> [n, ...]."""
    owned = shard_range(len(rows))
    return rows[owned.start : owned.stop]


def all_to_all_rows(
    rows: Tensor, send_counts: Sequence[int] | None = None, receive_counts: Sequence[int] | None = None
) -> Tensor:
    """Send some of the rows to each rank and return the received rows in rank order, without gradient.

    Args:
        rows: [s, ...], in the order of the ranks that they are sent to.
        send_counts: number of rows for each rank; equal numbers if None.
        receive_counts: number of rows from each rank; as many as are sent to it if None.
    """
    if get_world_size() == 1:
        return rows
    record_collective("all_to_all")
    rows = rows.detach().contiguous()
    num_received = sum(receive_counts) if receive_counts is not None else len(rows)
    received = rows.new_empty(num_received, *rows.shape[1:])
    received_sizes, sent_sizes = (None if n is None else list(n) for n in (receive_counts, send_counts))
    dist.all_to_all_single(received, rows, received_sizes, sent_sizes)
    return received


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Sum a tensor over ranks in place, without gradient."""
    if get_world_size() > 1:
        record_collective("all_reduce sum")
        dist.all_reduce(values)
    return values


def all_reduce_max_(values: Tensor) -> Tensor:
    """Take the maximum of a tensor over ranks in place, without gradient."""
    if get_world_size() > 1:
        record_collective("all_reduce max")
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; its backward is the same sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce_sum_(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum_(gradients[0].clone())


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over ranks, with gradient.

    Every rank computes the same loss from the sum, and gradients are averaged over ranks afterwards. The backward
    therefore sums, which gives the gradient of a single process that holds all rows.
    """
    return _AllReduceSum.apply(values) if get_world_size() > 1 else values  # pyright: ignore[reportReturnType]


class _AllGather(torch.autograd.Function):
    """Rows of all ranks; the backward sums the gradients that every rank has for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_to_all_rows(gradients[0]).view(get_world_size(), -1, *gradients[0].shape[1:]).sum(0)


def all_gather_rows_with_grad(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, with gradient: [b, ...] -> [B, ...]; b is equal everywhere.

    The loss of a rank also has gradients for rows of other ranks; they are summed on the rank that the rows came from.
    """
    return _AllGather.apply(rows) if get_world_size() > 1 else rows  # pyright: ignore[reportReturnType]


def any_across_ranks(flag: bool) -> bool:
    """Return whether the flag is set on any rank; the result is the same on all ranks."""
    return bool(all_reduce_max_(torch.tensor([float(flag)])).item())


def broadcast(value: Any, source: int = 0) -> Any:
    """Return the value of one rank on all ranks (picklable, trusted values only)."""
    if get_world_size() == 1:
        return value
    record_collective("broadcast")
    values = [value]
    dist.broadcast_object_list(values, src=source, device=torch.device("cpu"))
    return values[0]


def compute_on_main_rank(work: Callable[[], T]) -> T:
    """Return the result (picklable) of a function that the main rank alone computes; the others wait without load."""
    return broadcast(work() if get_rank() == 0 else None)


def run_on_main_rank(work: Callable[[], None], advice: str) -> None:
    """Run a function on the main rank; all ranks raise its error.

    Args:
        work: the function.
        advice: what to do about an error of the file system, e.g. "choose another --out".

    Raises:
        UserError: the error of the main rank, on every rank.
    """
    failure = ""
    if get_rank() == 0:
        try:
            work()
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}; {advice}."
    if failure := broadcast(failure):
        raise UserError(failure)


def call_on_main_rank(work: Callable[[], T], advice: str) -> T:
    """Return the result of a function that the main rank calls, on all ranks; it may take longer than `run.timeout_s`.

    Args:
        work: the function; it must not use collectives.
        advice: what to do about an error of the file system, e.g. "free disk space".

    Raises:
        UserError: the error of the main rank, on every rank.
    """
    outcome: list[tuple[T | None, str]] = []
    failures: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append((work(), ""))
        except UserError as error:
            outcome.append((None, str(error)))
        except OSError as error:
            outcome.append((None, f"{error.filename}: {error.strerror}; {advice}."))
        except BaseException as error:  # noqa: BLE001  # Raised in the main thread.
            outcome.append((None, f"rank 0: {type(error).__name__}: {error}"))
            failures.append(error)

    thread = threading.Thread(target=call, name="main rank", daemon=True)

    def is_running() -> bool:
        thread.join(_POLL_S)
        return thread.is_alive()

    if get_rank() == 0:
        thread.start()
    while any_across_ranks(get_rank() == 0 and is_running()):  # The watchdog sees the progress of all ranks.
        pass
    result, failure = broadcast(outcome[0] if get_rank() == 0 else None)
    if failures:
        raise failures[0]
    if failure:
        raise UserError(failure)
    return result


def all_gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in rank order, on all ranks (picklable, trusted values only)."""
    if get_world_size() == 1:
        return [value]
    record_collective("all_gather objects")
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Return when every rank has called this function."""
    if get_world_size() > 1:
        all_reduce_sum_(torch.zeros(1))


def ring_shards(rows: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of every rank, this rank's own first; the next rows are received while the current ones are used.

    Args:
        rows: [n, ...] of this rank.
        sizes: number of rows of each rank.

    Yields:
        The owner and its rows. A rank sends W - 1 shards and receives as many.
    """
    world_size, rank = get_world_size(), get_rank()
    current = rows.contiguous()
    for step in range(world_size):
        owner = (rank - step) % world_size
        pending, upcoming = [], current
        record_collective("ring exchange")
        if step + 1 < world_size:
            upcoming = rows.new_empty(sizes[(owner - 1) % world_size], *rows.shape[1:])
            transfers = [
                dist.P2POp(dist.isend, current, (rank + 1) % world_size),
                dist.P2POp(dist.irecv, upcoming, (rank - 1) % world_size),
            ]
            pending = dist.batch_isend_irecv([transfer for transfer in transfers if transfer.tensor.numel()])
        yield owner, current
        for transfer in pending:
            transfer.wait()
        current = upcoming


def shard_range(num_rows: int, owner: int | None = None, owners: int | None = None) -> range:
    """Return the contiguous ids of 0..num_rows-1 that a rank owns; the sizes of ranks differ by at most one."""
    num_owners, position = owners or get_world_size(), get_rank() if owner is None else owner
    return range(num_rows * position // num_owners, num_rows * (position + 1) // num_owners)
