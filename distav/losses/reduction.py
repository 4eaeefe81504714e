"""Reduction of per-sample losses to a scalar."""

from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_, get_world_size


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Return this rank's term of sum(w * loss) / sum(w) over the global batch, a tensor without dimensions.

    The term is multiplied by the world size, so averaging gradients over ranks yields the gradient of the global mean.

    Args:
        losses: [b] losses of this rank.
        weights: [b] weights; 0 for masked rows.
    """
    total = all_reduce_sum_(weights.detach().sum())
    return get_world_size() * (weights * losses).sum() / total.clamp_min(1e-12)
