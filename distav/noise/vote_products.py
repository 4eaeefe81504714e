"""Probabilities of the given labels under weighted products of votes, with an explicit gradient.

The fit of the label model evaluates these probabilities and their gradient several hundred times. All products are
computed by one matrix product and one softmax, and the gradient by one matrix product.
Legend: n samples, C classes, G noise rates, K votes, P products.
"""

from typing import Any

import torch
from torch import Tensor

from distav.noise.model_parameters import Parameters, Votes

VISUAL, AUDIO, FUSED = range(3)
"""Products of votes: those of either modality, and all; with joint votes two more, all without those of a modality."""


def exponents(parameters: Parameters, votes: Votes) -> Tensor:
    """Return the exponent of each vote in each product, as `distav.noise.vote_model` defines them: [G, P, K].

    P is 3, or 5 with joint votes: the products without the audio and without the visual votes come last.
    """
    scales = parameters.votes[:, :-3].exp()
    counts = (len(votes.visual), len(votes.audio), len(votes.visual), len(votes.audio), len(votes.joint))
    visual, audio, visual_factor, audio_factor, joint = scales.split(counts, dim=1)
    no_visual, no_audio, no_joint = torch.zeros_like(visual), torch.zeros_like(audio), torch.zeros_like(joint)
    rows = [
        (visual, no_audio, no_joint),
        (no_visual, audio, no_joint),
        (visual_factor, audio_factor, joint),
    ]
    if votes.joint:
        rows += [(visual_factor, no_audio, joint), (no_visual, audio_factor, joint)]
    return torch.stack([torch.cat(row, dim=1) for row in rows], dim=1)


def product_likelihoods(exponents: Tensor, tables: Tensor, labels: Tensor, label_probs: Tensor | None) -> Tensor:
    """Return sum_c p(c) P(y | c) for p = softmax(sum_k b_k log V_k): [G, P, n]; p(y) without `label_probs`.

    Args:
        exponents: [G, P, K] b.
        tables: [K, C, n] log V.
        labels: [n] y.
        label_probs: [G, C, n] P(y | c).
    """
    likelihoods: Tensor = _ProductLikelihoods.apply(exponents, tables, labels, label_probs)
    return likelihoods


class _ProductLikelihoods(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exponents: Tensor, tables: Tensor, labels: Tensor, label_probs: Tensor | None) -> Tensor:
        logits = exponents.flatten(0, 1) @ tables.flatten(1)
        probs = logits.view(*exponents.shape[:2], *tables.shape[1:]).softmax(2)
        if label_probs is None:
            likelihoods = probs.gather(2, labels.expand(*probs.shape[:2], 1, -1)).squeeze(2)
        else:
            likelihoods = (probs * label_probs[:, None]).sum(2)
        ctx.save_for_backward(tables, labels, label_probs, probs, likelihoods)
        return likelihoods

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        tables, labels, label_probs, probs, likelihoods = ctx.saved_tensors
        if label_probs is None:
            weights = gradient * likelihoods
            logits = probs * -weights[:, :, None]
            logits.scatter_add_(2, labels.expand(*probs.shape[:2], 1, -1), weights[:, :, None])
        else:
            logits = label_probs[:, None] - likelihoods[:, :, None]
            logits *= probs
            logits *= gradient[:, :, None]
        by_vote = logits.view(-1, tables[0].numel()) @ tables.flatten(1).t()
        return by_vote.view(*probs.shape[:2], -1), None, None, None
