"""Category-level contrastive loss over the global batch (Li et al. 2021, "Contrastive Clustering", equation 6).

The two views are the two modalities. Cosines between category columns need K x K Gram matrices only, which are summed
over ranks. Rows are never gathered; the rows of the memory bank enter as Gram matrices that the bank maintains.

Legend: b samples of this rank, B of all ranks, K categories.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum, all_reduce_sum_

PLATEAU_MARGIN = 0.01
"""Nats below log(2K - 1) at which the contrast counts as having left the plateau."""
MIN_USED_FRACTION = 0.25
"""Fraction of the categories below which their use counts as collapsed."""


@dataclass(frozen=True)
class CategoryLoss:
    """Terms of the loss, each a scalar, and the rows they were computed from.

    Attributes:
        contrast: contrastive loss between category columns; log(2K - 1) on the plateau, where every row is uniform.
        imbalance: 0 if all categories are used equally, 2 log K if one category takes all samples.
        row_entropy: mean entropy of a sample's category distribution.
        weighted_probs: [b, 2, K] rows that form the columns, without gradient.
    """

    contrast: Tensor
    imbalance: Tensor
    row_entropy: Tensor
    weighted_probs: Tensor


def weighted_category_probs(visual: Tensor, audio: Tensor, weights: Tensor) -> Tensor:
    """Return the rows that form the category columns, sqrt(w) softmax(logits): [b, 2, K].

    Args:
        visual, audio: [b, K] category logits.
        weights: [b] weight of each pair.
    """
    return torch.stack([visual.softmax(1), audio.softmax(1)], dim=1) * weights.clamp_min(0).sqrt()[:, None, None]


def category_loss(
    visual: Tensor,
    audio: Tensor,
    weights: Tensor,
    temperature: float,
    memory: tuple[Tensor, Tensor] | None = None,
    memory_weight: float = 1.0,
) -> CategoryLoss:
    """Return the category-level contrastive loss between the two modalities.

    With `memory`, the columns are those of a batch in which every row is accompanied by `memory_weight` average rows of
    the bank: G = G_batch + memory_weight B G_bank / N_bank. Without it, columns are poorly estimated if B < 5 K.

    Args:
        visual, audio: [b, K] category logits.
        weights: [b] weight of each pair, 0 for masked rows; rows are scaled by its root before columns are formed.
        temperature: tau_c.
        memory: Gram matrices [3, K, K] of this rank's bank rows, and their number, a tensor without dimensions.
        memory_weight: weight of the bank rows.
    """
    log_probs = visual.log_softmax(1), audio.log_softmax(1)
    probs = log_probs[0].exp(), log_probs[1].exp()
    scale = weights.clamp_min(0).sqrt()[:, None]
    u, z = probs[0] * scale, probs[1] * scale
    present = (weights > 0).to(u.dtype)
    entropies = [-(p * log_p).sum(1) @ present for p, log_p in zip(probs, log_probs, strict=True)]
    num = visual.shape[1]
    gram: Any = _GramMatrices.apply(u, z)
    local = [gram, torch.stack([present @ p for p in probs]), torch.stack([*entropies, present.sum()])]
    packed = all_reduce_sum(torch.cat([part.flatten() for part in local]))
    gram, marginal, sums = packed.split([3 * num * num, 2 * num, 3])
    count = sums[2].clamp_min(1)
    gram = gram.view(3, num, num)
    if memory:
        bank_gram = all_reduce_sum_(torch.cat([memory[0].flatten(), memory[1].to(memory[0].dtype).view(1)]))
        scale = memory_weight * count.detach() / bank_gram[-1].clamp_min(1)
        gram = gram + (scale * bank_gram[:-1]).view_as(gram).to(gram.dtype)
    marginal = (marginal.view(2, num) / count).clamp_min(1e-12)
    return CategoryLoss(
        contrast=_column_contrast(gram, temperature),
        imbalance=2 * math.log(num) + (marginal * marginal.log()).sum(),
        row_entropy=sums[:2].sum() / (2 * count),
        weighted_probs=torch.stack([u, z], dim=1).detach(),
    )


def _column_contrast(gram: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss between category columns from their Gram matrices u'u, u'z and z'z: [3, K, K]."""
    uu, uz, zz = gram
    norm_u, norm_z = uu.diagonal().clamp_min(1e-12).sqrt(), zz.diagonal().clamp_min(1e-12).sqrt()
    same_u = uu / (norm_u[:, None] * norm_u) / temperature
    same_z = zz / (norm_z[:, None] * norm_z) / temperature
    cross = uz / (norm_u[:, None] * norm_z) / temperature
    diagonal = torch.eye(len(uu), dtype=torch.bool, device=uu.device)
    terms = [
        torch.logsumexp(torch.cat([same.masked_fill(diagonal, -torch.inf), across], dim=1), dim=1) - cross.diagonal()
        for same, across in ((same_u, cross), (same_z, cross.T))
    ]
    return torch.stack(terms).mean()


def detect_category_collapse(contrast: float, imbalance: float, num_categories: int) -> str | None:
    """Return a description of the collapse, or None if the categories are in use.

    The loss has two degenerate solutions: all samples in one category, which the imbalance term prevents, and the
    plateau where every sample is in all categories equally, which the row entropy term prevents.

    Args:
        contrast, imbalance: terms of `CategoryLoss`, averaged over some steps.
        num_categories: K.
    """
    if contrast >= math.log(2 * num_categories - 1) - PLATEAU_MARGIN:
        return "every sample is distributed almost equally over all categories"
    used = effective_num_categories(imbalance, num_categories)
    if used < MIN_USED_FRACTION * num_categories:
        return f"only about {used:.1f} of {num_categories} categories are used"
    return None


def effective_num_categories(imbalance: float, num_categories: int) -> float:
    """Return the effective number of categories: exp of the mean entropy of the marginal distributions."""
    return num_categories * math.exp(-imbalance / 2)


class _GramMatrices(torch.autograd.Function):
    """Gram matrices of columns u and z [b, K]; two of them are symmetric, which saves a third of the backward pass."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(u, z)
        return torch.stack([u.T @ u, u.T @ z, z.T @ z])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        u, z = ctx.saved_tensors
        uu, uz, zz = gradients[0]
        return torch.addmm(z @ uz.T, u, uu + uu.T), torch.addmm(u @ uz, z, zz + zz.T)


def category_agreement(weighted_probs: Tensor) -> Tensor:
    """Return the degree from 0 to 1 to which both modalities predict the same category: [b].

    A common factor of both rows, such as the pair's weight, cancels; rows of weight 0 give 0.

    Args:
        weighted_probs: [b, 2, K], from `weighted_category_probs`.
    """
    p, q = weighted_probs.unbind(1)
    return ((p * q).sum(1) / (p.amax(1) * q.amax(1)).clamp_min(1e-12)).clamp(0, 1)
