"""Drawn rows of the bank instead of all (AVID; Morgado et al. 2021a), for comparison with the exact softmax.

Owners score the drawn rows and average them; scores and averages travel, rows do not.
Legend: b queries of this rank, B of all ranks, M negatives, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_rows, all_reduce_sum_, all_to_all_rows, get_world_size
from distav.distributed.rng import sample_seeds, uniform
from distav.memory.bank import Bank

_QUERIES = 128
"""Queries whose drawn rows are looked up at a time."""


@dataclass
class Partition:
    """The constant Z of noise-contrastive estimation: the mean of exp(score) over the first negatives ever drawn.

    It is taken once, for both directions, and kept for the whole run (AVID's `avg_exp_score`).
    """

    value: float | None = None

    def take(self, logits: Tensor) -> float:
        """Return Z, from these scores [b, M] of all ranks where it is not known yet."""
        if self.value is None:
            self.value = float(all_reduce_sum_(logits.exp().sum().double())) / (get_world_size() * logits.numel())
        return self.value


def drawn_ids(ids: Tensor, number: int, num_samples: int, seed: int, step: int) -> Tensor:
    """Draw ids with replacement from all but a sample's own: [B] -> [B, M] int64.

    They hang on (seed, step, id), so every number of ranks draws the same.
    """
    high, low = uniform(sample_seeds(seed, step, ids), 3, 2 * number).double().chunk(2, dim=1)
    other = ((high + low / 2**24) * (num_samples - 1)).long().clamp_max(num_samples - 2)
    return other + (other >= ids[:, None])


@dataclass(frozen=True)
class NegativeSampling:
    """Which rows are drawn: `number` for each sample, by a seed, anew at each step."""

    number: int
    seed: int
    step: int


class SampledRows:
    """The rows drawn for the samples of a batch, wherever they are kept; both modalities' are of the same ids."""

    def __init__(self, bank: Bank, ids: Tensor, draw: NegativeSampling):
        """Take the ids of the batch of all ranks, [B]."""
        self.bank = bank
        place = drawn_ids(ids, draw.number, bank.num_samples, draw.seed, draw.step) - bank.rows.start
        self._own = (place >= 0) & (place < len(bank.rows))
        self._place = place.masked_fill(~self._own, 0)

    def products(self, queries: Tensor, modality: str) -> Tensor:
        """Return the products of the batch's queries with their drawn rows: [B, D] of all ranks -> [b, M]."""
        column = self.bank.columns[modality]
        if not len(column):
            return _sum_for_own(torch.zeros_like(self._own, dtype=torch.float32))
        parts = [torch.einsum("bd,bmd->bm", queries[some], column[self._place[some]]) for some in _slices(len(queries))]
        return _sum_for_own(torch.cat(parts).masked_fill(~self._own, 0.0))

    def sums(self, factors: Tensor, modality: str) -> Tensor:
        """Return the sums of the drawn rows times factors: [b, M] -> [b, D]."""
        column, every = self.bank.columns[modality], all_gather_rows(factors).masked_fill(~self._own, 0.0)
        if not len(column):
            return _sum_for_own(every.new_zeros(len(every), column.shape[1]))
        parts = [torch.einsum("bm,bmd->bd", every[some], column[self._place[some]]) for some in _slices(len(every))]
        return _sum_for_own(torch.cat(parts))


def _slices(number: int) -> list[slice]:
    return [slice(start, start + _QUERIES) for start in range(0, number, _QUERIES)]


def _sum_for_own(parts: Tensor) -> Tensor:
    """Add up what every rank found for this rank's queries: [B, ...] -> [b, ...]."""
    return all_to_all_rows(parts).view(get_world_size(), -1, *parts.shape[1:]).sum(0)
