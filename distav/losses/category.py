"""The category-level contrastive loss over the global batch (Li et al. 2021, "Contrastive Clustering", equation 6).

The two views are the two modalities. Cosines between category columns need only K x K Gram matrices, which ranks add
up; rows are never gathered. Legend: b rows of this rank, K categories.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.world import sum_across


@dataclass(frozen=True)
class CategoryLoss:
    """The parts of the loss, each a scalar.

    Attributes:
        contrast: columns of one category alike, of two categories different; log(2K - 1) on the plateau where every
            row is uniform, so training has to bring it below that.
        imbalance: 0 where all categories are used equally, 2 log K where one takes all.
        row_entropy: mean entropy of a sample's categories.
    """

    contrast: Tensor
    imbalance: Tensor
    row_entropy: Tensor


def category_loss(visual: Tensor, audio: Tensor, weights: Tensor, temperature: float) -> CategoryLoss:
    """Compare how the two modalities use the categories.

    Args:
        visual, audio: [b, K] category logits.
        weights: [b] weight of each pair; 0 for masked rows. Rows are scaled by its root before columns are formed.
        temperature: tau_c.
    """
    shares = {"visual": visual.softmax(1), "audio": audio.softmax(1)}
    scale = weights.clamp_min(0).sqrt()[:, None]
    u, z = shares["visual"] * scale, shares["audio"] * scale
    present = (weights > 0).float()[:, None]
    entropies = [-(each * each.clamp_min(1e-12).log() * present).sum() for each in shares.values()]
    num = visual.shape[1]
    local = [u.T @ u, u.T @ z, z.T @ z, torch.stack([(each * present).sum(0) for each in shares.values()])]
    tail = torch.stack([*entropies, present.sum()])
    packed = sum_across(torch.cat([part.flatten() for part in [*local, tail]]))
    sizes = [num * num] * 3 + [2 * num, 3]
    uu, uz, zz, marginal, sums = packed.split(sizes)
    uu, uz, zz = (each.view(num, num) for each in (uu, uz, zz))
    count = sums[2].clamp_min(1)
    marginal = marginal.view(2, num) / count
    norm_u, norm_z = uu.diagonal().clamp_min(1e-12).sqrt(), zz.diagonal().clamp_min(1e-12).sqrt()
    same_u = uu / (norm_u[:, None] * norm_u) / temperature
    same_z = zz / (norm_z[:, None] * norm_z) / temperature
    cross = uz / (norm_u[:, None] * norm_z) / temperature
    itself = torch.eye(num, dtype=torch.bool, device=uu.device)
    terms = [
        torch.logsumexp(torch.cat([within.masked_fill(itself, -torch.inf), across], dim=1), dim=1) - cross.diagonal()
        for within, across in ((same_u, cross), (same_z, cross.T))
    ]
    used = marginal.clamp_min(1e-12)
    return CategoryLoss(
        contrast=torch.stack(terms).mean(),
        imbalance=2 * math.log(num) + (used * used.log()).sum(),
        row_entropy=sums[:2].sum() / (2 * count),
    )


def category_agreement(visual: Tensor, audio: Tensor) -> Tensor:
    """Return how far both modalities name the same category, 0..1: logits [b, K] twice -> [b]."""
    p, q = visual.softmax(1), audio.softmax(1)
    return ((p * q).sum(1) / (p.amax(1) * q.amax(1))).clamp(0, 1)
