"""The cross-modal memory bank: one row for each sample and modality, each held by the rank that owns its id.

A step moves only the rows of the batch; traffic does not depend on the size of the bank. Rows are kept in float32,
since a moving average in bfloat16 stalls. Legend: N rows in all, n rows of this rank, B global batch, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.world import gather_ragged_rows, row_range, sum_


class Bank:
    """Rows of both modalities with their visits, pair correspondence and category agreement.

    Attributes:
        rows: ids that this rank owns.
        columns: the state by name, each [n, ...]: `visual`, `audio` [n, D]; `visits` [n], how often a row was written;
            `correspondence` [n], the estimated probability that a pair belongs together; `category_agreement` [n]. Phases add columns of their
            own, such as the votes of a correction; all are saved and restored alike.
    """

    def __init__(self, num_samples: int, dim: int, momentum: float, device: torch.device):
        self.num_samples, self.momentum, self.device = num_samples, momentum, device
        self.rows = row_range(num_samples)
        size = len(self.rows)
        self.columns = {
            "visual": torch.zeros(size, dim, device=device),
            "audio": torch.zeros(size, dim, device=device),
            "visits": torch.zeros(size, device=device),
            "correspondence": torch.ones(size, device=device),
            "category_agreement": torch.ones(size, device=device),
        }

    @property
    def unseen_bias(self) -> Tensor:
        """[n] logit bias that leaves out rows without a visit."""
        return torch.zeros_like(self.columns["visits"]).masked_fill(self.columns["visits"] == 0, -torch.inf)

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

    def open_rows(self, ids: Tensor, valid: Tensor, new: dict[str, Tensor]) -> None:
        """Fill rows that were never written with their first embeddings, so that no target is random.

        Args:
            ids, valid: [B] of the global batch, the same on every rank.
            new: `visual`, `audio` [B, D] unit vectors and `category_agreement` [B].
        """
        self._move(ids, valid & (self.fetch("visits", ids) == 0), new, 0.0)

    def update(self, ids: Tensor, valid: Tensor, new: dict[str, Tensor]) -> None:
        """Move rows towards new embeddings: normalise(m * old + (1 - m) * new), repeated ids averaged first.

        Args:
            ids, valid: [B] of the global batch, the same on every rank.
            new: `visual`, `audio` [B, D] unit vectors and `category_agreement` [B].
        """
        self._move(ids, valid, new, self.momentum)

    def _move(self, ids: Tensor, valid: Tensor, new: dict[str, Tensor], momentum: float) -> None:
        """Write to this rank's rows; embeddings that are not finite leave theirs as they are."""
        finite = torch.stack([torch.isfinite(each).view(len(ids), -1).all(1) for each in new.values()]).all(0)
        place = self.local(ids)
        own = valid & finite & (place >= 0)
        touched, row = torch.unique(place[own], return_inverse=True)
        count = torch.zeros(len(touched), device=self.device).index_add_(0, row, torch.ones_like(row).float())
        for name, values in new.items():
            column = self.columns[name]
            mean = column.new_zeros(len(touched), *column.shape[1:]).index_add_(0, row, values[own].to(column.dtype))
            mean /= count.view([-1] + [1] * (column.dim() - 1))
            moved = momentum * column[touched] + (1 - momentum) * mean
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
