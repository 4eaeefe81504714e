"""Drawn rows of the bank instead of all (AVID; Morgado et al. 2021a), for comparison with the exact softmax.

Owners score the drawn rows and average them; scores and averages travel, rows do not.
Legend: b queries of this rank, B of all ranks, M negatives, D width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.bank import Bank, Visitors
from distav.seeding import sample_seeds, uniform
from distav.world import exchange, gather_rows, num_ranks, own_rows, sum_

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
            total = sum_(torch.stack([logits.exp().sum().double(), logits.new_tensor(logits.numel()).double()]))
            self.value = float(total[0] / total[1])
        return self.value


def drawn_ids(ids: Tensor, number: int, num_samples: int, seed: int, step: int) -> Tensor:
    """Draw ids with replacement from all but a sample's own: [B] -> [B, M] int64.

    They hang on (seed, step, id), so every number of ranks draws the same.
    """
    high, low = uniform(sample_seeds(seed, step, ids), 3, 2 * number).double().chunk(2, dim=1)
    other = ((high + low / 2**24) * (num_samples - 1)).long().clamp_max(num_samples - 2)
    return other + (other >= ids[:, None])


def sampled_attend(
    bank: Bank,
    visitors: Visitors,
    targets: dict[str, Tensor],
    directions: tuple[tuple[str, str], ...],
    temperature: float,
    number: int,
    seed: int,
    step: int,
    partition: Partition | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Attend over each sample's own row and M drawn ones.

    With a partition Z the own row is told from the drawn ones one by one, by binary cross-entropy against M Z:
    loss = softplus(log MZ - s) + sum_n softplus(s_n - log MZ). It comes as the lse and out that give this loss and its
    gradient where a softmax would stand: lse - s, and (out - row) / temperature.

    Args:
        bank: the rows.
        visitors: queries of all ranks.
        targets: [b, D] bank rows of this rank's samples by modality.
        directions: pairs of the modality that asks and the one that answers.
        temperature: divides the dot products.
        number: M.
        seed, step: make the draw.
        partition: Z of noise-contrastive estimation; None for a softmax.

    Returns:
        For each direction lse [b] and out [b, D] of this rank's queries.
    """
    ids = drawn_ids(visitors.ids, number, bank.num_samples, seed, step)
    place = ids - bank.rows.start
    own = (place >= 0) & (place < len(bank.rows))
    place = place.masked_fill(~own, 0)
    found = []
    for asking, answering in directions:
        queries, column = getattr(visitors, asking), bank.columns[answering]
        mine = own_rows(queries)
        logits = _sum_for_own(_scores(queries, column, place, own)) / temperature
        positive = (mine * targets[answering]).sum(1, keepdim=True) / temperature
        every = torch.cat([positive, logits], dim=1)
        if partition:
            above = every - math.log(number * partition.take(logits))
            lse = F.softplus(-above[:, 0]) + F.softplus(above[:, 1:]).sum(1) + positive.squeeze(1)
            share = above.sigmoid()
        else:
            lse = every.logsumexp(1)
            share = (every - lse[:, None]).exp()
        drawn = _sum_for_own(_averages(gather_rows(share[:, 1:]), column, place, own))
        found.append((lse, share[:, :1] * targets[answering] + drawn))
    return found


def _scores(queries: Tensor, column: Tensor, place: Tensor, own: Tensor) -> Tensor:
    """Return the products with the drawn rows that this rank owns, 0 elsewhere: [B, M]."""
    if not len(column):
        return torch.zeros_like(own, dtype=torch.float32)
    parts = [
        torch.einsum("bd,bmd->bm", queries[start : start + _QUERIES], column[place[start : start + _QUERIES]])
        for start in range(0, len(queries), _QUERIES)
    ]
    return torch.cat(parts).masked_fill(~own, 0.0)


def _averages(shares: Tensor, column: Tensor, place: Tensor, own: Tensor) -> Tensor:
    """Return the sums over the drawn rows that this rank owns, times their shares: [B, D]."""
    shares = shares.masked_fill(~own, 0.0)
    if not len(column):
        return shares.new_zeros(len(shares), column.shape[1])
    parts = [
        torch.einsum("bm,bmd->bd", shares[start : start + _QUERIES], column[place[start : start + _QUERIES]])
        for start in range(0, len(shares), _QUERIES)
    ]
    return torch.cat(parts)


def _sum_for_own(parts: Tensor) -> Tensor:
    """Add up what every rank found for this rank's queries: [B, ...] -> [b, ...]."""
    return exchange(parts).view(num_ranks(), -1, *parts.shape[1:]).sum(0)
