"""Exchange of rows between the rank with an id in its batch and the rank that owns the id.

Legend: N rows, b samples of this rank's batch, B of all ranks, W ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_to_all_rows, get_rank, get_world_size, shard_range


@dataclass(frozen=True)
class _Route:
    """Where the rows of one batch are sent.

    Attributes:
        ids: [B] ids of the batch of all ranks.
        owned: positions in the batch of the ids that this rank owns.
        owned_from_rank: [W] how many of these positions are in the batch of each rank.
        by_owner: [b] positions in this rank's batch, sorted by owner.
        sent_to_owner: [W] how many of this rank's ids each rank owns.
    """

    ids: Tensor
    owned: Tensor
    owned_from_rank: list[int]
    by_owner: Tensor
    sent_to_owner: list[int]


class RowRouter:
    """Sends rows of a batch to the owners of their ids and back.

    Every method takes the ids [B] of the batch of all ranks, the same on every rank, and has to be called on every
    rank. Traffic depends on the size of the batch alone, not on N.
    """

    def __init__(self, num_rows: int, device: torch.device):
        first_ids = [shard_range(num_rows, rank).start for rank in range(get_world_size())]
        self._first_ids = torch.tensor(first_ids, device=device)
        self._last_route: _Route | None = None

    def owner(self, ids: Tensor) -> Tensor:
        """Return the rank that owns each id: [B] -> [B]."""
        return torch.searchsorted(self._first_ids, ids, right=True) - 1

    def owned(self, ids: Tensor) -> slice | Tensor:
        """Return the positions in the batch of the ids that this rank owns."""
        return slice(None) if get_world_size() == 1 else self._route(ids).owned

    def scatter_to_owners(self, values: Tensor, ids: Tensor) -> Tensor:
        """Send rows of this rank's batch to the owners of their ids.

        Args:
            values: [b, ...] of this rank's batch.
            ids: [B] of all ranks.

        Returns:
            Rows of the ids that this rank owns, in the order of `ids`.
        """
        if get_world_size() == 1:
            return values
        route = self._route(ids)
        return all_to_all_rows(values[route.by_owner], route.sent_to_owner, route.owned_from_rank)

    def gather_from_owners(self, values: Tensor, ids: Tensor) -> Tensor:
        """Send rows of owned ids to the ranks whose batches contain the ids; the inverse of `scatter_to_owners`.

        Args:
            values: rows of the ids that this rank owns, in the order of `ids`.
            ids: [B] of all ranks.

        Returns:
            [b, ...] rows of this rank's batch. A rank sends (W - 1) / W of b rows on average.
        """
        if get_world_size() == 1:
            return values
        route = self._route(ids)
        received = all_to_all_rows(values, route.owned_from_rank, route.sent_to_owner)
        rows = torch.empty_like(received)
        rows[route.by_owner] = received
        return rows

    def _route(self, ids: Tensor) -> _Route:
        """Return the route of a batch; computed once per batch, since the host waits for the device to know sizes."""
        if self._last_route is None or self._last_route.ids is not ids:
            rank, owner = get_rank(), self.owner(ids).view(get_world_size(), -1)
            counts = [
                (owner == rank).sum(1),
                (owner[rank][:, None] == torch.arange(get_world_size(), device=ids.device)).sum(0),
            ]
            owned_from_rank, sent_to_owner = torch.stack(counts).tolist()
            owned = (owner.flatten() != rank).byte().argsort(stable=True)[: sum(owned_from_rank)]
            by_owner = owner[rank].argsort(stable=True)
            self._last_route = _Route(ids, owned, owned_from_rank, by_owner, sent_to_owner)
        return self._last_route
