"""The cross-modal memory bank: one row for each sample and modality, held by the rank that owns its id.

A step moves only the rows of the batch; traffic does not depend on the size of the bank. Where the bank is small every
rank may hold all embeddings instead (replicated): then the loss needs no traffic but the new rows'. Rows are kept in
float32, since a moving average in bfloat16 stalls.
Legend: N rows in all, n rows of this rank, b batch of this rank, B of all ranks, D width, K categories.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import (
    all_gather_variable_rows,
    all_to_all_rows,
    get_rank,
    get_world_size,
    local_batch,
    shard_range,
)
from distav.distributed.rng import sample_seeds, uniform
from distav.memory.category_gram import CategoryAssignments
from distav.memory.global_batch import GlobalBatch
from distav.memory.row_update import RowUpdate

_TILE_NUMBERS, _TILE_NUMBERS_ON_GPU = 2**18, 2**20
"""Numbers of a column that are computed at a time."""
_MODALITIES = ("visual", "audio")


class Bank:
    """Rows of both modalities with their visits, pair correspondence and categories.

    Attributes:
        rows: ids that this rank owns.
        held: ids whose embeddings this rank holds: all of them where the bank is replicated, else `rows`.
        columns: the state of the owned rows by name, each [n, ...]: `visual`, `audio` [n, D]; `visits` [n], how often
            a row was written; `pair_similarity` [n], its cosine between picture and sound; `correspondence` [n], the
            estimated probability that a pair belongs together; `category_agreement` [n]; `categories` [n, 2, K] uint8.
            Phases add columns of their own, such as the votes of a correction; all are saved and restored alike.
        assignments: what the categories of the owned rows add up to.
    """

    def __init__(
        self,
        num_samples: int,
        dim: int,
        momentum: float,
        device: torch.device,
        seed: int = 0,
        *,
        num_categories: int = 0,
        replicated: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.num_samples, self.momentum, self.device, self.dtype = num_samples, momentum, device, dtype
        self._seed = seed
        self.replicated = replicated and get_world_size() > 1
        self.rows = shard_range(num_samples)
        self.resident = range(num_samples) if self.replicated else self.rows
        size, own = len(self.rows), slice(self.rows.start - self.resident.start, self.rows.stop - self.resident.start)
        self._resident = {name: torch.empty(len(self.resident), dim, device=device) for name in _MODALITIES} | {
            "visits": torch.zeros(len(self.resident), device=device),
            "pair_similarity": torch.zeros(len(self.resident), device=device),
        }
        self.columns = {name: column[own] for name, column in self._resident.items()} | {
            "correspondence": torch.ones(size, device=device),
            "category_agreement": torch.ones(size, device=device),
        }
        self.assignments = CategoryAssignments(size, num_categories, device)
        if num_categories:
            self.columns["categories"] = self.assignments.shares
        self._rounded: dict[str, Tensor] = {}
        if dtype is not torch.float32:
            self._rounded = {name: torch.empty_like(self._resident[name], dtype=dtype) for name in _MODALITIES}
        starts = [shard_range(num_samples, each).start for each in range(get_world_size())]
        self._starts = torch.tensor(starts, device=device)
        self._routed: _Route | None = None
        self._begin()

    def reinitialize(self) -> None:
        """Forget the embeddings and what was seen of them; the correspondence of pairs stays."""
        self._resident["visits"].zero_()
        self.columns["category_agreement"].fill_(1.0)
        self.assignments.clear()
        self._begin()

    def refresh(self) -> None:
        """Bring what follows from the columns up to date after they were written from outside."""
        self._compare_pairs()
        self._round()
        self.assignments.recount()

    def _begin(self) -> None:
        """Fill the rows with unit vectors of random direction that depend on the id, not on the rank that owns it.

        They spread the first targets over the sphere; from the alike embeddings of a new network, rows would tell
        apart by age alone.
        """
        for stream, name in enumerate(_MODALITIES, start=1):
            column = self._resident[name]
            dim = column.shape[1]
            for tile in self._tiles():
                ids = torch.arange(self.resident[tile].start, self.resident[tile].stop, device=self.device)
                draws = uniform(sample_seeds(self._seed, 0, ids), stream, 2 * dim).clamp_min(1e-7)
                radius, angle = (-2 * draws[:, :dim].log()).sqrt(), 2 * math.pi * draws[:, dim:]
                column[tile] = F.normalize(radius * angle.cos(), dim=1)
        self._compare_pairs()
        self._round()

    def _compare_pairs(self) -> None:
        for tile in self._tiles():
            pairs = self._resident["visual"][tile] * self._resident["audio"][tile]
            self._resident["pair_similarity"][tile] = pairs.sum(1)

    def _round(self) -> None:
        for name, rounded in self._rounded.items():
            rounded.copy_(self._resident[name])

    def _tiles(self) -> Iterator[slice]:
        """Yield the places of the held rows, some at a time, so that what is computed of them takes little memory."""
        numbers = _TILE_NUMBERS_ON_GPU if self.device.type == "cuda" else _TILE_NUMBERS
        step = max(1, numbers // self._resident["visual"].shape[1])
        for start in range(0, len(self.resident), step):
            yield slice(start, min(start + step, len(self.resident)))

    def keys(self, name: str) -> Tensor:
        """Return the held rows of a modality in the dtype of the product: [held, D]."""
        return self._rounded.get(name, self._resident[name])

    def resident_column(self, name: str) -> Tensor:
        """Return `visits` or `pair_similarity` of the held rows: [held]."""
        return self._resident[name]

    def local_index(self, ids: Tensor) -> Tensor:
        """Return the place of each id among the held rows, -1 for the rows of others: [B] -> [B]."""
        place = ids - self.resident.start
        return place.masked_fill((place < 0) | (place >= len(self.resident)), -1)

    def fetch(self, names: Sequence[str], ids: Tensor) -> list[Tensor]:
        """Return columns at the ids of this rank's part of a batch.

        Args:
            names: columns of numbers.
            ids: [B] of all ranks, the same on every rank.

        Returns:
            For each name [b, ...]; a rank sends the rows that others ask for, (W - 1) / W of b in all.
        """
        mine = local_batch(ids)
        columns = [self.columns[name] for name in names]
        if get_world_size() == 1:
            return [column[mine] for column in columns]
        if self.replicated and all(name in self._resident for name in names):
            return [self._resident[name][mine] for name in names]
        widths = [math.prod(column.shape[1:]) for column in columns]
        route = self._route(ids)
        place = ids[route.owned] - self.rows.start
        flat = torch.cat(
            [column[place].view(len(place), width).float() for column, width in zip(columns, widths, strict=True)],
            dim=1,
        )
        came = all_to_all_rows(flat, route.of_rank, route.by_owner)
        found = torch.empty_like(came)
        found[route.order] = came
        parts = found.split(widths, dim=1)
        return [part.reshape(len(mine), *column.shape[1:]) for part, column in zip(parts, columns, strict=True)]

    def scatter_to_owners(self, values: Tensor, ids: Tensor) -> Tensor:
        """Send rows of this rank's batch to the ranks that own their ids.

        Args:
            values: [b, ...] of this rank.
            ids: [B] of all ranks.

        Returns:
            The rows of the ids that this rank owns, in the order in which they stand in `ids`.
        """
        if get_world_size() == 1:
            return values
        route = self._route(ids)
        return all_to_all_rows(values[route.order], route.by_owner, route.of_rank)

    def _route(self, ids: Tensor) -> "_Route":
        """Return where the rows of a batch have to go; found once for each batch, since the host waits for it."""
        if self._routed is None or self._routed.ids is not ids:
            me, owner = get_rank(), self.owner(ids).view(get_world_size(), -1)
            counts = [
                (owner == me).sum(1),
                (owner[me][:, None] == torch.arange(get_world_size(), device=ids.device)).sum(0),
            ]
            of_rank, by_owner = torch.stack(counts).tolist()
            owned = (owner.flatten() != me).byte().argsort(stable=True)[: sum(of_rank)]
            self._routed = _Route(ids, owned, of_rank, owner[me].argsort(stable=True), by_owner)
        return self._routed

    def _owned(self, ids: Tensor) -> slice | Tensor:
        """Return the places in a batch of the ids that this rank owns."""
        return slice(None) if get_world_size() == 1 else self._route(ids).owned

    def write(self, name: str, values: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Put rows of this rank's batch into a column, where their owners keep it; repeated ids are averaged.

        Args:
            name: a column of numbers.
            values: [b, ...] of this rank.
            ids, valid: [B] of all ranks; rows that are not valid, or not finite, are left out.
        """
        came = self.scatter_to_owners(values.reshape(len(values), -1).float(), ids)
        owned, column = self._owned(ids), self.columns[name]
        touched = RowUpdate(ids[owned] - self.rows.start, valid[owned] & torch.isfinite(came.sum(1)))
        mean = touched.mean(came).view(-1, *column.shape[1:]).to(column.dtype)
        touched.change(column, lambda _old: mean)

    def owner(self, ids: Tensor) -> Tensor:
        """Return the rank that owns each id: [B] -> [B]."""
        return torch.searchsorted(self._starts, ids, right=True) - 1

    def gather_column(self, name: str) -> Tensor:
        """Return a column of one number a row for all ids: [N]."""
        return all_gather_variable_rows(self.columns[name])

    def pair_similarity(self) -> Tensor:
        """Return the cosine between picture and sound of every pair in the bank, NaN where never visited: [N]."""
        similarity = self.columns["pair_similarity"].masked_fill(self.columns["visits"] == 0, torch.nan)
        return all_gather_variable_rows(similarity)

    def update(self, visitors: GlobalBatch, agreement: Tensor, shares: Tensor | None = None) -> None:
        """Move rows towards new embeddings: normalise(m * old + (1 - m) * new), repeated ids averaged first.

        Embeddings that are not finite leave their rows as they are.

        Args:
            visitors: embeddings of all ranks.
            agreement: [b] category agreement of this rank's batch.
            shares: [b, 2, K] category shares of picture and sound, 0..1, scaled by the root of the pair's weight.
        """
        ids, owned = visitors.ids, self._owned(visitors.ids)
        held = slice(None) if self.replicated else owned
        sound = visitors.valid & torch.isfinite(visitors.visual.sum(1)) & torch.isfinite(visitors.audio.sum(1))
        moved = RowUpdate(ids[held] - self.resident.start, sound[held])
        pair = []
        for name in _MODALITIES:
            mean = moved.mean(getattr(visitors, name)[held])
            rows = moved.change(self._resident[name], lambda old, mean=mean: F.normalize(self._mixed(old, mean), dim=1))
            if self._rounded:
                self._rounded[name][moved.rows] = rows.to(self.dtype)
            pair.append(rows)
        moved.change(self._resident["visits"], lambda old: old + 1)
        moved.change(self._resident["pair_similarity"], lambda _old: (pair[0] * pair[1]).sum(1))

        own = torch.cat([agreement[:, None]] + ([shares.flatten(1)] if shares is not None else []), dim=1)
        own = self.scatter_to_owners(own.detach().float(), ids)
        usable, same = sound[owned] & torch.isfinite(own.sum(1)), None if self.replicated else moved
        touched = RowUpdate(ids[owned] - self.rows.start, usable, same)
        mean = touched.mean(own)
        touched.change(self.columns["category_agreement"], lambda old: self._mixed(old, mean[:, 0]))
        if shares is not None:
            new = mean[:, 1:].view(-1, *shares.shape[1:])
            self.assignments.replace(touched.rows, new, touched.written, touched.first)

    def _mixed(self, old: Tensor, new: Tensor) -> Tensor:
        return self.momentum * old + (1 - self.momentum) * new

    def set_correspondence(self, correspondence: Tensor) -> None:
        """Store the correspondence of all pairs: [N], the same on every rank."""
        self.columns["correspondence"].copy_(correspondence[self.rows.start : self.rows.stop])

    def state(self) -> dict[str, Tensor]:
        """Return this rank's rows for a checkpoint, with the range of ids that they cover."""
        found = {
            name: column.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, column in self.columns.items()
        }
        return found | {"range": torch.tensor([self.rows.start, self.rows.stop, self.num_samples])}

    def restore(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Take this rank's rows out of the parts that any number of ranks saved; reads no more of them than it needs.

        Raises:
            ValueError: where the parts do not cover this rank's rows.
        """
        missing = torch.ones(len(self.resident), dtype=torch.bool)
        for part in parts:
            start, stop, total = part["range"].tolist()
            if total != self.num_samples:
                raise ValueError(f"the saved bank has {total} rows, this run has {self.num_samples} training samples")
            for name, saved in part.items():
                if name != "range":
                    self._take(name, saved, start)
            missing[max(0, start - self.resident.start) : max(0, stop - self.resident.start)] = False
            if not missing.any():
                break
        if missing.any():
            raise ValueError(f"the saved bank lacks {int(missing.sum())} of this rank's rows")
        self._round()
        self.assignments.recount()

    def _take(self, name: str, saved: Tensor, start: int) -> None:
        """Copy what this rank holds of a saved column, whose first row has the id `start`."""
        if name not in self.columns:
            self.columns[name] = torch.zeros(len(self.rows), *saved.shape[1:], dtype=saved.dtype, device=self.device)
        rows = self.resident if name in self._resident else self.rows
        column = self._resident.get(name, self.columns[name])
        low, high = max(start, rows.start), min(start + len(saved), rows.stop)
        if low < high:
            column[low - rows.start : high - rows.start].copy_(saved[low - start : high - start])


@dataclass(frozen=True)
class _Route:
    """Where the rows of a batch have to go.

    Attributes:
        ids: [B] of all ranks, the batch.
        owned: places in the batch of the ids that this rank owns.
        of_rank: how many of those stand in the part of each rank.
        order: [b] this rank's part of the batch, sorted by owner.
        by_owner: how many of it each rank owns.
    """

    ids: Tensor
    owned: Tensor
    of_rank: list[int]
    order: Tensor
    by_owner: list[int]
