"""The cross-modal memory bank: one row for each sample and modality, held by the rank that owns its id.

A step moves only the rows of the batch; traffic does not depend on the size of the bank. Where the bank is small every
rank may hold all embeddings instead (replicated): then the loss needs no traffic but the new rows'. Rows are kept in
float32, since a moving average in bfloat16 stalls.
Legend: N rows in all, n rows of this rank, b batch of this rank, B of all ranks, D width, K categories.
"""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.assignments import Assignments
from distav.memory.visitors import Visitors
from distav.seeding import sample_seeds, uniform
from distav.world import exchange, gather_ragged_rows, num_ranks, own_rows, rank, row_range


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
        self.replicated = replicated and num_ranks() > 1
        self.rows = row_range(num_samples)
        self.held = range(num_samples) if self.replicated else self.rows
        # Random directions spread the first targets over the sphere; from the alike embeddings of a new network,
        # rows would tell apart by age alone.
        size, own = len(self.rows), slice(self.rows.start - self.held.start, self.rows.stop - self.held.start)
        self._held = {
            "visual": self._random_rows(seed, 1, dim),
            "audio": self._random_rows(seed, 2, dim),
            "visits": torch.zeros(len(self.held), device=device),
            "pair_similarity": torch.zeros(len(self.held), device=device),
        }
        self.columns = {name: column[own] for name, column in self._held.items()} | {
            "correspondence": torch.ones(size, device=device),
            "category_agreement": torch.ones(size, device=device),
        }
        self.assignments = Assignments(size, num_categories, device)
        if num_categories:
            self.columns["categories"] = self.assignments.shares
        self._rounded: dict[str, Tensor] = {}
        self.refresh()

    def restart(self) -> None:
        """Forget the embeddings and what was seen of them; the correspondence of pairs stays."""
        dim = self._held["visual"].shape[1]
        for stream, name in enumerate(("visual", "audio"), start=1):
            self._held[name].copy_(self._random_rows(self._seed, stream, dim))
        self._held["visits"].zero_()
        self.columns["category_agreement"].fill_(1.0)
        self.assignments.shares.zero_()
        self.refresh()

    def refresh(self) -> None:
        """Bring what follows from the columns up to date after they were written from outside."""
        self._held["pair_similarity"].copy_((self._held["visual"] * self._held["audio"]).sum(1))
        self._follow()

    def _follow(self) -> None:
        if self.dtype is not torch.float32:
            self._rounded = {name: self._held[name].to(self.dtype) for name in ("visual", "audio")}
        self.assignments.recount()

    def _random_rows(self, seed: int, stream: int, dim: int) -> Tensor:
        """Return unit vectors of random direction that hang on the id, not on the rank that holds it: [held, D]."""
        ids = torch.arange(self.held.start, self.held.stop, device=self.device)
        draws = uniform(sample_seeds(seed, 0, ids), stream, 2 * dim).clamp_min(1e-7)
        radius, angle = (-2 * draws[:, :dim].log()).sqrt(), 2 * math.pi * draws[:, dim:]
        return F.normalize(radius * angle.cos(), dim=1)

    def keys(self, name: str) -> Tensor:
        """Return the held rows of a modality in the dtype of the product: [held, D]."""
        return self._rounded.get(name, self._held[name])

    def held_column(self, name: str) -> Tensor:
        """Return `visits` or `pair_similarity` of the held rows: [held]."""
        return self._held[name]

    def place(self, ids: Tensor) -> Tensor:
        """Return the place of each id among the held rows, -1 for the rows of others: [B] -> [B]."""
        return _within(ids, self.held)

    def fetch(self, names: Sequence[str], ids: Tensor) -> list[Tensor]:
        """Return columns at the ids of this rank's part of a batch.

        Args:
            names: columns of numbers.
            ids: [B] of all ranks, the same on every rank.

        Returns:
            For each name [b, ...]; a rank sends the rows that others ask for, (W - 1) / W of b in all.
        """
        mine = own_rows(ids)
        columns = [self.columns[name] for name in names]
        if num_ranks() == 1:
            return [column[mine] for column in columns]
        if self.replicated and all(name in self._held for name in names):
            return [self._held[name][mine] for name in names]
        widths = [math.prod(column.shape[1:]) for column in columns]
        wanted = _within(ids, self.rows)
        asked = wanted >= 0
        place = wanted[asked]
        flat = torch.cat(
            [column[place].view(len(place), width).float() for column, width in zip(columns, widths, strict=True)],
            dim=1,
        )
        to = asked.view(num_ranks(), -1).sum(1).tolist()
        owner = self.owner(mine)
        came = exchange(flat, to, torch.bincount(owner, minlength=num_ranks()).tolist())
        found = torch.empty_like(came)
        found[owner.argsort(stable=True)] = came
        parts = found.split(widths, dim=1)
        return [part.reshape(len(mine), *column.shape[1:]) for part, column in zip(parts, columns, strict=True)]

    def deliver(self, values: Tensor, ids: Tensor) -> Tensor:
        """Send rows of this rank's batch to the ranks that own their ids.

        Args:
            values: [b, ...] of this rank.
            ids: [B] of all ranks.

        Returns:
            The rows of the ids that this rank owns, in the order in which they stand in `ids`.
        """
        if num_ranks() == 1:
            return values
        owner = self.owner(ids).view(num_ranks(), -1)
        mine = owner[rank()]
        to = torch.bincount(mine, minlength=num_ranks()).tolist()
        return exchange(values[mine.argsort(stable=True)], to, (owner == rank()).sum(1).tolist())

    def write(self, name: str, values: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Put rows of this rank's batch into a column, where their owners keep it; repeated ids are averaged.

        Args:
            name: a column of numbers.
            values: [b, ...] of this rank.
            ids, valid: [B] of all ranks; rows that are not valid, or not finite, are left out.
        """
        came = self.deliver(values.reshape(len(values), -1).float(), ids)
        place = _within(ids, self.rows)
        asked = place >= 0
        touched = _Touched(place[asked], valid[asked] & torch.isfinite(came.sum(1)))
        column = self.columns[name]
        column[touched.rows] = touched.mean(came).view(-1, *column.shape[1:]).to(column.dtype)

    def owner(self, ids: Tensor) -> Tensor:
        """Return the rank that owns each id: [B] -> [B]."""
        starts = [row_range(self.num_samples, each).start for each in range(num_ranks())]
        return torch.searchsorted(torch.tensor(starts, device=ids.device), ids, right=True) - 1

    def whole(self, name: str) -> Tensor:
        """Return a column of one number a row for all ids: [N]."""
        return gather_ragged_rows(self.columns[name])

    def pair_similarity(self) -> Tensor:
        """Return the cosine between picture and sound of every pair in the bank, NaN where never visited: [N]."""
        similarity = self.columns["pair_similarity"].masked_fill(self.columns["visits"] == 0, torch.nan)
        return gather_ragged_rows(similarity)

    def update(self, visitors: Visitors, agreement: Tensor, shares: Tensor | None = None) -> None:
        """Move rows towards new embeddings: normalise(m * old + (1 - m) * new), repeated ids averaged first.

        Embeddings that are not finite leave their rows as they are.

        Args:
            visitors: embeddings of all ranks.
            agreement: [b] category agreement of this rank's batch.
            shares: [b, 2, K] category shares of picture and sound, 0..1, scaled by the root of the pair's weight.
        """
        ids = visitors.ids
        sound = visitors.valid & torch.isfinite(visitors.visual.sum(1)) & torch.isfinite(visitors.audio.sum(1))
        moved = _Touched(_within(ids, self.held), sound)
        for name in ("visual", "audio"):
            column = self._held[name]
            mean = moved.mean(getattr(visitors, name))
            column[moved.rows] = F.normalize(self.momentum * column[moved.rows] + (1 - self.momentum) * mean, dim=1)
            if self._rounded:
                self._rounded[name][moved.rows] = column[moved.rows].to(self.dtype)
        self._held["visits"][moved.rows] += 1
        pairs = self._held["visual"][moved.rows] * self._held["audio"][moved.rows]
        self._held["pair_similarity"][moved.rows] = pairs.sum(1)

        own = torch.cat([agreement[:, None]] + ([shares.flatten(1)] if shares is not None else []), dim=1)
        own = self.deliver(own.detach().float(), ids)
        place = _within(ids, self.rows)
        asked = place >= 0
        touched = _Touched(place[asked], sound[asked] & torch.isfinite(own.sum(1)))
        mean = touched.mean(own)
        column = self.columns["category_agreement"]
        column[touched.rows] = self.momentum * column[touched.rows] + (1 - self.momentum) * mean[:, 0]
        if shares is not None:
            self.assignments.replace(touched.rows, mean[:, 1:].view(-1, *shares.shape[1:]))

    def believe(self, correspondence: Tensor) -> None:
        """Store the correspondence of all pairs: [N], the same on every rank."""
        self.columns["correspondence"].copy_(correspondence[self.rows.start : self.rows.stop])

    def state(self) -> dict[str, Tensor]:
        """Return this rank's rows for a checkpoint, with the range of ids that they cover."""
        found = {name: column.to("cpu", copy=True).contiguous() for name, column in self.columns.items()}
        return found | {"range": torch.tensor([self.rows.start, self.rows.stop, self.num_samples])}

    def restore(self, parts: Iterable[dict[str, Tensor]]) -> None:
        """Take this rank's rows out of the parts that any number of ranks saved; reads no more of them than it needs.

        Raises:
            ValueError: where the parts do not cover this rank's rows.
        """
        missing = torch.ones(len(self.held), dtype=torch.bool)
        for part in parts:
            start, stop, total = part["range"].tolist()
            if total != self.num_samples:
                raise ValueError(f"the saved bank has {total} rows, this run has {self.num_samples} training samples")
            for name, saved in part.items():
                if name != "range":
                    self._take(name, saved, start)
            missing[max(0, start - self.held.start) : max(0, stop - self.held.start)] = False
            if not missing.any():
                break
        if missing.any():
            raise ValueError(f"the saved bank lacks {int(missing.sum())} of this rank's rows")
        self._follow()

    def _take(self, name: str, saved: Tensor, start: int) -> None:
        """Copy what this rank holds of a saved column, whose first row has the id `start`."""
        if name not in self.columns:
            self.columns[name] = torch.zeros(len(self.rows), *saved.shape[1:], dtype=saved.dtype, device=self.device)
        rows = self.held if name in self._held else self.rows
        column = self._held.get(name, self.columns[name])
        low, high = max(start, rows.start), min(start + len(saved), rows.stop)
        if low < high:
            column[low - rows.start : high - rows.start] = saved[low - start : high - start].to(self.device)


class _Touched:
    """Rows that a batch writes, each once, with the mean of what it brings."""

    def __init__(self, place: Tensor, usable: Tensor):
        self.usable = usable & (place >= 0)
        self.rows, self.row_of = torch.unique(place[self.usable], return_inverse=True)

    def mean(self, values: Tensor) -> Tensor:
        """Average values [B, ...] by row: [touched, ...]."""
        used = values[self.usable]
        if len(self.rows) == len(used):  # no id twice
            return torch.empty_like(used).index_copy_(0, self.row_of, used)
        total = used.new_zeros(len(self.rows), *used.shape[1:]).index_add_(0, self.row_of, used)
        count = used.new_zeros(len(self.rows)).index_add_(0, self.row_of, used.new_ones(len(used)))
        return total / count.view([-1] + [1] * (used.dim() - 1))


def _within(ids: Tensor, rows: range) -> Tensor:
    place = ids - rows.start
    return place.masked_fill((place < 0) | (place >= len(rows)), -1)
