"""The cross-modal memory bank: one row for each sample and modality, each held by the rank that owns its id.

A step moves only the rows of the batch; traffic does not depend on the size of the bank. Rows are kept in float32,
since a moving average in bfloat16 stalls. Legend: N rows in all, n rows of this rank, B global batch, D width.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.seeding import sample_seeds, uniform
from distav.world import gather_ragged_rows, row_range, sum_


class Bank:
    """Rows of both modalities with their visits, pair correspondence and category agreement.

    Attributes:
        rows: ids that this rank owns.
        columns: the state by name, each [n, ...]: `visual`, `audio` [n, D]; `visits` [n], how often a row was written;
            `correspondence` [n], the estimated probability that a pair belongs together; `category_agreement` [n].
            Phases add columns of their own, such as the votes of a correction; all are saved and restored alike.
    """

    def __init__(self, num_samples: int, dim: int, momentum: float, device: torch.device, seed: int = 0):
        self.num_samples, self.momentum, self.device = num_samples, momentum, device
        self.rows = row_range(num_samples)
        size = len(self.rows)
        # Random directions spread the first targets over the sphere; from the alike embeddings of a new network,
        # rows would tell apart by age alone.
        self.columns = {
            "visual": self._random_rows(seed, 1, dim),
            "audio": self._random_rows(seed, 2, dim),
            "visits": torch.zeros(size, device=device),
            "correspondence": torch.ones(size, device=device),
            "category_agreement": torch.ones(size, device=device),
        }

    def _random_rows(self, seed: int, stream: int, dim: int) -> Tensor:
        """Return unit vectors of random direction that hang on the id, not on the rank that owns it: [n, D]."""
        ids = torch.arange(self.rows.start, self.rows.stop, device=self.device)
        draws = uniform(sample_seeds(seed, 0, ids), stream, 2 * dim).clamp_min(1e-7)
        radius, angle = (-2 * draws[:, :dim].log()).sqrt(), 2 * math.pi * draws[:, dim:]
        return F.normalize(radius * angle.cos(), dim=1)

    def local(self, ids: Tensor) -> Tensor:
        """Return the place of each id among this rank's rows, -1 for the rows of others: [B] -> [B]."""
        place = ids - self.rows.start
        return place.masked_fill((place < 0) | (place >= len(self.rows)), -1)

    def fetch(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of one column for ids that are the same on every rank: [B] -> [B, ...]."""
        place = self.local(ids)
        column = self.columns[name]
        found = column.new_zeros(len(ids), *column.shape[1:])
        own = place >= 0
        found[own] = column[place[own]]
        return sum_(found)

    def whole(self, name: str) -> Tensor:
        """Return a column of one number a row for all ids: [N]."""
        return gather_ragged_rows(self.columns[name])

    def pair_similarity(self) -> Tensor:
        """Return the cosine between picture and sound of every pair in the bank, NaN where never visited: [N]."""
        similarity = (self.columns["visual"] * self.columns["audio"]).sum(1)
        return gather_ragged_rows(similarity.masked_fill(self.columns["visits"] == 0, torch.nan))

    def update(self, ids: Tensor, valid: Tensor, new: dict[str, Tensor]) -> None:
        """Move rows towards new embeddings: normalise(m * old + (1 - m) * new), repeated ids averaged first.

        Embeddings that are not finite leave their rows as they are.

        Args:
            ids, valid: [B] of the global batch, the same on every rank.
            new: `visual`, `audio` [B, D] unit vectors and `category_agreement` [B].
        """
        finite = torch.stack([torch.isfinite(each).view(len(ids), -1).all(1) for each in new.values()]).all(0)
        place = self.local(ids)
        own = valid & finite & (place >= 0)
        touched, row = torch.unique(place[own], return_inverse=True)
        count = torch.zeros(len(touched), device=self.device).index_add_(0, row, torch.ones_like(row).float())
        for name, values in new.items():
            column = self.columns[name]
            mean = column.new_zeros(len(touched), *column.shape[1:]).index_add_(0, row, values[own].to(column.dtype))
            mean /= count.view([-1] + [1] * (column.dim() - 1))
            moved = self.momentum * column[touched] + (1 - self.momentum) * mean
            column[touched] = F.normalize(moved, dim=1) if column.dim() > 1 else moved
        self.columns["visits"][touched] += 1

    def believe(self, correspondence: Tensor) -> None:
        """Store the correspondence of all pairs: [N], the same on every rank."""
        self.columns["correspondence"].copy_(correspondence[self.rows.start : self.rows.stop])

    def state(self) -> dict[str, Tensor]:
        """Return this rank's rows for a checkpoint, with the range of ids that they cover."""
        ends = torch.tensor([self.rows.start, self.rows.stop, self.num_samples])
        return {name: column.cpu().contiguous() for name, column in self.columns.items()} | {"range": ends}

    def restore(self, parts: Sequence[dict[str, Tensor]]) -> None:
        """Take this rank's rows out of the parts that any number of ranks saved.

        Raises:
            ValueError: where the parts do not cover this rank's rows.
        """
        missing = torch.ones(len(self.rows), dtype=torch.bool)
        for name in {name for part in parts for name in part} - {"range"} - set(self.columns):
            like = next(part[name] for part in parts if name in part)
            self.columns[name] = torch.zeros(len(self.rows), *like.shape[1:], dtype=like.dtype, device=self.device)
        for part in parts:
            start, stop, total = part["range"].tolist()
            if total != self.num_samples:
                raise ValueError(f"the saved bank has {total} rows, this run has {self.num_samples} training samples")
            low, high = max(start, self.rows.start), min(stop, self.rows.stop)
            if low >= high:
                continue
            here, there = slice(low - self.rows.start, high - self.rows.start), slice(low - start, high - start)
            for name, column in self.columns.items():
                column[here] = part[name][there].to(self.device)
            missing[here] = False
        if missing.any():
            raise ValueError(f"the saved bank lacks {int(missing.sum())} of this rank's rows")
