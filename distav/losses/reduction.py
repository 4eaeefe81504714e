"""Reduction of per-sample losses to a scalar."""

from torch import Tensor

from distav.distributed.collectives import num_ranks, sum_


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return this rank's share of sum(w * loss) / sum(w) over the global batch.

    It is scaled by the number of ranks, so that averaging gradients over ranks restores the global ratio.
    """
    total = sum_(weights.detach().sum())
    return num_ranks() * (weights * losses).sum() / total.clamp_min(1e-12)
