"""Rows of the memory bank sampled as negatives (AVID; Morgado et al. 2021a), the alternative to the exact softmax.

The owners of the sampled rows compute the scores and the averages; these are exchanged, the rows are not.
Legend: b samples of this rank, B of all ranks, M negatives, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import (
    all_gather_rows,
    all_reduce_sum_,
    all_to_all_rows,
    get_world_size,
    local_batch,
)
from distav.distributed.rng import sample_seeds, uniform
from distav.memory.bank import Bank

_QUERIES_PER_TILE = 128
"""Queries whose sampled rows are read at a time."""
_RNG_STREAM = 3


@dataclass
class Partition:
    """The constant Z of noise-contrastive estimation: the mean of exp(score) over the first negatives of the run.

    It is estimated once, for both directions, and kept for the complete run (`avg_exp_score` in AVID's code).
    """

    value: float | None = None

    def get_or_estimate(self, logits: Tensor) -> float:
        """Return Z; the first call estimates it from the scores [b, M] of all ranks."""
        if self.value is None:
            self.value = float(all_reduce_sum_(logits.exp().sum().double())) / (get_world_size() * logits.numel())
        return self.value


def sample_negative_ids(ids: Tensor, num_negatives: int, num_samples: int, seed: int, step: int) -> Tensor:
    """Sample ids with replacement, for each sample from all ids but its own: [B] -> [B, M] int64.

    They depend on (seed, step, id) alone, so they are the same on any number of ranks.
    """
    high, low = uniform(sample_seeds(seed, step, ids), _RNG_STREAM, 2 * num_negatives).double().chunk(2, dim=1)
    other = ((high + low / 2**24) * (num_samples - 1)).long().clamp_max(num_samples - 2)
    return other + (other >= ids[:, None])


@dataclass(frozen=True)
class NegativeSampling:
    """Number of negatives per sample, and the seed and the step that determine them."""

    num_negatives: int
    seed: int
    step: int


class SampledRows:
    """The rows sampled for a batch, on the ranks that own them; both modalities use the same ids."""

    def __init__(self, bank: Bank, ids: Tensor, sampling: NegativeSampling):
        """Sample rows for the batch of all ranks, ids [B]."""
        self.bank = bank
        sampled = sample_negative_ids(ids, sampling.num_negatives, bank.num_samples, sampling.seed, sampling.step)
        self._ids = local_batch(sampled)
        index = sampled - bank.rows.start
        self._is_owned = (index >= 0) & (index < len(bank.rows))
        self._index = index.masked_fill(~self._is_owned, 0)

    def missing(self, modality: str) -> Tensor | None:
        """Return which sampled rows lack a modality, [b, M] bool of this rank's samples; None if no sample lacks it."""
        present = self.bank.present.get(modality)
        return None if present is None else ~present[self._ids]

    def products(self, queries: Tensor, modality: str) -> Tensor:
        """Return the dot products of the queries with their sampled rows: [B, D] of all ranks -> [b, M]."""
        column = self.bank.columns[modality]
        if not len(column):
            return _sum_over_ranks(torch.zeros_like(self._is_owned, dtype=torch.float32))
        products = [
            torch.einsum("bd,bmd->bm", queries[tile], column[self._index[tile]]) for tile in _query_tiles(len(queries))
        ]
        return _sum_over_ranks(torch.cat(products).masked_fill(~self._is_owned, 0.0))

    def weighted_sums(self, weights: Tensor, modality: str) -> Tensor:
        """Return the sum of the sampled rows of each sample, multiplied by weights: [b, M] -> [b, D]."""
        column = self.bank.columns[modality]
        weights = all_gather_rows(weights).masked_fill(~self._is_owned, 0.0)
        if not len(column):
            return _sum_over_ranks(weights.new_zeros(len(weights), column.shape[1]))
        sums = [
            torch.einsum("bm,bmd->bd", weights[tile], column[self._index[tile]]) for tile in _query_tiles(len(weights))
        ]
        return _sum_over_ranks(torch.cat(sums))


def _query_tiles(num_queries: int) -> list[slice]:
    return [slice(start, start + _QUERIES_PER_TILE) for start in range(0, num_queries, _QUERIES_PER_TILE)]


def _sum_over_ranks(parts: Tensor) -> Tensor:
    """Sum what all ranks computed for this rank's samples: [B, ...] -> [b, ...]."""
    return all_to_all_rows(parts).view(get_world_size(), -1, *parts.shape[1:]).sum(0)
