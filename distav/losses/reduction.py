"""Reduction of per-sample losses to a scalar."""

from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_, get_world_size


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return this rank's share of sum(w * loss) / sum(w) over the global batch.

    It is scaled by the number of ranks, so that averaging gradients over ranks restores the global ratio.
    """
    total = all_reduce_sum_(weights.detach().sum())
    return get_world_size() * (weights * losses).sum() / total.clamp_min(1e-12)
