"""The category-level contrastive loss over the global batch (Li et al. 2021, "Contrastive Clustering", equation 6).

The two views are the two modalities. Cosines between category columns need only K x K Gram matrices, which ranks add
up; rows are never gathered, and the bank's rows enter by sums that are kept beside it.
Legend: b rows of this rank, B of all ranks, K categories.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum, all_reduce_sum_

PLATEAU_MARGIN = 0.01
"""Nats below log(2K - 1) that a contrast has to fall to have left the plateau."""
MIN_USED_FRACTION = 0.25
"""Share of the categories below which their use counts as a collapse."""


@dataclass(frozen=True)
class CategoryLoss:
    """The parts of the loss, each a scalar.

    Attributes:
        contrast: columns of one category alike, of two categories different; log(2K - 1) on the plateau where every
            row is uniform, so training has to bring it below that.
        imbalance: 0 where all categories are used equally, 2 log K where one takes all.
        row_entropy: mean entropy of a sample's categories.
        shares: [b, 2, K] the rows that formed the columns, without gradient.
    """

    contrast: Tensor
    imbalance: Tensor
    row_entropy: Tensor
    shares: Tensor


def weighted_shares(visual: Tensor, audio: Tensor, weights: Tensor) -> Tensor:
    """Return the rows that form the columns, sqrt(w) softmax(logits): [b, K] twice -> [b, 2, K]."""
    return torch.stack([visual.softmax(1), audio.softmax(1)], dim=1) * weights.clamp_min(0).sqrt()[:, None, None]


def category_loss(
    visual: Tensor,
    audio: Tensor,
    weights: Tensor,
    temperature: float,
    memory: tuple[Tensor, Tensor] | None = None,
    memory_weight: float = 1.0,
) -> CategoryLoss:
    """Compare how the two modalities use the categories.

    With the bank's stored rows the columns are as if each batch row came with `memory_weight` average rows of the
    bank: G = G_batch + memory_weight B G_bank / N_bank. The batch alone says little about columns where B < 5 K.

    Args:
        visual, audio: [b, K] category logits.
        weights: [b] weight of each pair; 0 for masked rows. Rows are scaled by its root before columns are formed.
        temperature: tau_c.
        memory: Gram matrices [3, K, K] of this rank's bank rows, and their number, a tensor without dimensions.
        memory_weight: how much they count.
    """
    logs = visual.log_softmax(1), audio.log_softmax(1)
    shares = logs[0].exp(), logs[1].exp()
    scale = weights.clamp_min(0).sqrt()[:, None]
    u, z = shares[0] * scale, shares[1] * scale
    present = (weights > 0).to(u.dtype)
    entropies = [-(each * log).sum(1) @ present for each, log in zip(shares, logs, strict=True)]
    num = visual.shape[1]
    products: Any = _Products.apply(u, z)
    local = [products, torch.stack([present @ each for each in shares])]
    tail = torch.stack([*entropies, present.sum()])
    packed = all_reduce_sum(torch.cat([part.flatten() for part in [*local, tail]]))
    products, marginal, sums = packed.split([3 * num * num, 2 * num, 3])
    count = sums[2].clamp_min(1)
    products = products.view(3, num, num)
    if memory:
        stored = all_reduce_sum_(torch.cat([memory[0].flatten(), memory[1].to(memory[0].dtype).view(1)]))
        scale = memory_weight * count.detach() / stored[-1].clamp_min(1)
        products = products + (scale * stored[:-1]).view_as(products).to(products.dtype)
    uu, uz, zz = products
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
        shares=torch.stack([u, z], dim=1).detach(),
    )


def detect_category_collapse(contrast: float, imbalance: float, num_categories: int) -> str | None:
    """Say what is wrong with the use of categories, if anything is.

    The loss falls into two traps: all samples in one category, against which the imbalance term works, and the
    plateau where every sample is in all categories alike, against which the row entropy does.

    Args:
        contrast, imbalance: means over some steps of the parts of `CategoryLoss`.
        num_categories: K.
    """
    if contrast >= math.log(2 * num_categories - 1) - PLATEAU_MARGIN:
        return "each sample is in all categories about alike"
    used = effective_num_categories(imbalance, num_categories)
    if used < MIN_USED_FRACTION * num_categories:
        return f"about {used:.1f} of {num_categories} categories are used"
    return None


def effective_num_categories(imbalance: float, num_categories: int) -> float:
    """Return how many categories, equally used, have the imbalance of these: exp of the mean marginal entropy."""
    return num_categories * math.exp(-imbalance / 2)


class _Products(torch.autograd.Function):
    """The Gram matrices of columns u and z [b, K]; two of three are symmetric, which spares the backward a third."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(u, z)
        return torch.stack([u.T @ u, u.T @ z, z.T @ z])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        u, z = ctx.saved_tensors
        uu, uz, zz = gradients[0]
        return torch.addmm(z @ uz.T, u, uu + uu.T), torch.addmm(u @ uz, z, zz + zz.T)


def category_agreement(shares: Tensor) -> Tensor:
    """Return how far both modalities name the same category, 0..1: `weighted_shares` [b, 2, K] -> [b].

    A common factor of both, such as the pair's weight, cancels; rows of weight 0 give 0.
    """
    p, q = shares.unbind(1)
    return ((p * q).sum(1) / (p.amax(1) * q.amax(1)).clamp_min(1e-12)).clamp(0, 1)
