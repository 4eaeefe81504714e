"""The ranks of a run: start-up, the few collectives we use, and agreement between ranks.

Every function also works in a single process without torch.distributed, where it is the identity.
Legend: W ranks, b rows on this rank, B rows on all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distav.config.errors import UserError
from distav.distributed.rendezvous import record_collective


def get_world_size() -> int:
    """Return the number of ranks W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_rank() -> int:
    """Return the number of this rank, 0..W-1."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order: [b, ...] -> [B, ...]; b is the same everywhere, no gradient."""
    rows = rows.detach().contiguous()
    if get_world_size() == 1:
        return rows
    record_collective("gathering rows")
    parts = [torch.empty_like(rows) for _ in range(get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def all_gather_variable_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order where ranks hold different numbers of rows; no gradient."""
    if get_world_size() == 1:
        return rows.detach()
    sizes = all_gather_rows(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    whole = all_gather_rows(padded).view(get_world_size(), max(sizes), *rows.shape[1:])
    return torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])


def local_batch(whole: Tensor) -> Tensor:
    """Return this rank's part of rows gathered by `gather_rows`: [B, ...] -> [b, ...]."""
    size = len(whole) // get_world_size()
    return whole[get_rank() * size : (get_rank() + 1) * size]


def local_shard(whole: Tensor) -> Tensor:
    """Return the rows that this rank takes of what all ranks hold: [N, ...] -> [n, ...], those of `row_range(N)`."""
    rows = shard_range(len(whole))
    return whole[rows.start : rows.stop]


def all_to_all_rows(rows: Tensor, to: Sequence[int] | None = None, of: Sequence[int] | None = None) -> Tensor:
    """Send a part of the rows to each rank and return what the ranks sent here, in rank order; no gradient.

    Args:
        rows: [s, ...], the parts in rank order.
        to: rows that go to each rank; equal parts where None.
        of: rows that come from each rank; as many as are sent to it where None.
    """
    if get_world_size() == 1:
        return rows
    record_collective("exchanging rows")
    rows = rows.detach().contiguous()
    came = rows.new_empty(sum(of) if of is not None else len(rows), *rows.shape[1:])
    dist.all_to_all_single(came, rows, of and list(of), to and list(to))
    return came


def all_reduce_sum_(values: Tensor) -> Tensor:
    """Add up a tensor over ranks, in place; no gradient."""
    if get_world_size() > 1:
        record_collective("adding up")
        dist.all_reduce(values)
    return values


def all_reduce_max_(values: Tensor) -> Tensor:
    """Take the maximum of a tensor over ranks, in place; no gradient."""
    if get_world_size() > 1:
        record_collective("agreeing")
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


class _Sum(torch.autograd.Function):
    """A sum over ranks whose backward sums too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce_sum_(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum_(gradients[0].clone())


def all_reduce_sum(values: Tensor) -> Tensor:
    """Add up a tensor over ranks with gradient.

    Every rank computes the same loss from the sum, and gradients are averaged over ranks afterwards, so the backward
    sums: that gives the gradient of one process that held all rows.
    """
    return _Sum.apply(values) if get_world_size() > 1 else values  # pyright: ignore[reportReturnType]


class _Gather(torch.autograd.Function):
    """Rows of all ranks, whose backward adds up what every rank has for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_to_all_rows(gradients[0]).view(get_world_size(), -1, *gradients[0].shape[1:]).sum(0)


def all_gather_rows_with_grad(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order with gradient: [b, ...] -> [B, ...]; b is the same everywhere.

    A rank's loss has gradients by the rows of others; they are added up where the rows came from.
    """
    return _Gather.apply(rows) if get_world_size() > 1 else rows  # pyright: ignore[reportReturnType]


def any_across_ranks(flag: bool) -> bool:
    """Whether any rank says yes; all ranks get the same answer."""
    return bool(all_reduce_max_(torch.tensor([float(flag)])).item())


def broadcast(value: Any, source: int = 0) -> Any:
    """Return what one rank holds to all ranks (picklable, trusted values only)."""
    if get_world_size() == 1:
        return value
    record_collective("telling all ranks")
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def run_on_main_rank(work: Callable[[], None]) -> None:
    """Let the main rank do something, and all ranks know if it could not.

    Raises:
        UserError: what the main rank met, on every rank.
    """
    problem = ""
    if get_rank() == 0:
        try:
            work()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}; choose another --out, or mend it."
    if problem := broadcast(problem):
        raise UserError(problem)


def all_gather_objects(value: Any) -> list[Any]:
    """Return what every rank holds, in rank order, to all ranks (picklable, trusted values only)."""
    if get_world_size() == 1:
        return [value]
    record_collective("asking all ranks")
    values: list[Any] = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Return when every rank has come here."""
    if get_world_size() > 1:
        all_reduce_sum_(torch.zeros(1))


def ring_shards(rows: Tensor, sizes: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of every rank in turn, this rank's own first; the next ones travel while these are used.

    Args:
        rows: [n, ...] of this rank.
        sizes: number of rows of each rank.

    Yields:
        The owner and its rows. A rank sends (W - 1) shards and receives as many.
    """
    world, me = get_world_size(), get_rank()
    current = rows.contiguous()
    for step in range(world):
        owner = (me - step) % world
        waiting, coming = [], current
        record_collective("passing rows on")
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


def shard_range(num_rows: int, owner: int | None = None, owners: int | None = None) -> range:
    """Return the contiguous ids that a rank owns out of 0..num_rows-1; sizes differ by one at most."""
    of, at = owners or get_world_size(), get_rank() if owner is None else owner
    return range(num_rows * at // of, num_rows * (at + 1) // of)
