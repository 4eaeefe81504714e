"""Cross-modal instance discrimination against the whole bank (xID; Morgado et al. 2021b, equations 1-9).

Legend: b rows of this rank, B of all ranks, D width, n bank rows of this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distav.memory.bank import Bank
from distav.memory.softmax import attend, merge_across_ranks
from distav.world import gather_rows, own_rows, sum_


@dataclass(frozen=True)
class SoftTargets:
    """How targets are softened.

    Attributes:
        kind: none, bootstrapping, swapped, neighbour or cycle.
        temperature: tau_s, divides the similarities between samples.
        cycle_temperature: tau_t, divides the pair similarities of cycle-consistent targets.
        excludes_self: whether a sample is left out of its own soft target.
    """

    kind: str = "cycle"
    temperature: float = 0.02
    cycle_temperature: float = 0.07
    excludes_self: bool = False


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient was found along with its value."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, losses: Tensor, gradients: Tensor) -> Tensor:
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (known,) = ctx.saved_tensors
        return gradients[0][:, None] * known, None, None


def instance_losses(
    bank: Bank,
    ids: Tensor,
    visual: Tensor,
    audio: Tensor,
    temperature: float,
    softness: Tensor | None = None,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Return each sample's loss in both directions, exact over all rows.

    With target T = (1 - s) onehot + s S the loss of a query q is lse - q . (sum_j T_j row_j) / tau, and its gradient
    is (sum_j P_j row_j - sum_j T_j row_j) / tau.

    Args:
        bank: holds the targets; not changed here.
        ids: [b] int64.
        visual, audio: [b, D] unit vectors, with gradient.
        temperature: tau.
        softness: [b] share s of the soft target, 0..1; None for hard targets.
        soft: how S is made.

    Returns:
        [b] losses, the sum of picture-to-sound and sound-to-picture.
    """
    queries = {"visual": gather_rows(visual), "audio": gather_rows(audio)}
    all_ids = gather_rows(ids)
    rows = {name: bank.fetch(name, all_ids) for name in ("visual", "audio")}
    shares = gather_rows(softness) if softness is not None and soft and soft.kind != "none" else None
    total = torch.zeros_like(own_rows(queries["visual"][:, 0]))
    for own, other, with_gradient in (("visual", "audio", visual), ("audio", "visual", audio)):
        keys = bank.columns[other]
        lse, expected = merge_across_ranks(*attend(queries[own], keys, keys, temperature))
        target = rows[other]
        if shares is not None and soft is not None and bool((shares > 0).any()):
            softened = _soft_rows(bank, soft, own, other, queries, rows, all_ids)
            target = torch.lerp(target, softened, shares[:, None])
        losses = lse - (queries[own] * target).sum(1) / temperature
        gradients = (expected - target) / temperature
        total = total + _KnownGradient.apply(with_gradient, own_rows(losses), own_rows(gradients))
    return total


def _soft_rows(
    bank: Bank,
    soft: SoftTargets,
    own: str,
    other: str,
    queries: dict[str, Tensor],
    rows: dict[str, Tensor],
    ids: Tensor,
) -> Tensor:
    """Return sum_j S(j|i) row_j over the other modality's rows, for queries of `own`: [B, D]."""
    bias = None
    if soft.kind == "bootstrapping":
        asked, keys = queries[own], other
    elif soft.kind == "swapped":
        asked, keys = queries[other], own
    elif soft.kind == "neighbour":
        asked, keys = rows[own], own
    else:  # Cycle: the query's own pair term is the same for all j and cancels.
        asked, keys = rows[other], other
        bias = (bank.columns["visual"] * bank.columns["audio"]).sum(1) / soft.cycle_temperature
    exclude = bank.local(ids) if soft.excludes_self else None
    found = attend(asked, bank.columns[keys], bank.columns[other], soft.temperature, bias=bias, exclude=exclude)
    return merge_across_ranks(*found)[1]


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return this rank's share of sum(w * loss) / sum(w) over the global batch.

    It is scaled by the number of ranks, so that averaging gradients over ranks restores the global ratio.
    """
    total = sum_(weights.detach().sum())
    ranks = sum_(torch.ones_like(total))
    return ranks * (weights * losses).sum() / total.clamp_min(1e-12)
