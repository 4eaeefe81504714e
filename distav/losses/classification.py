"""Losses on class labels that may be wrong.

Legend: b rows of this rank, C classes.
"""

import torch
from torch import Tensor


def hybrid_targets(given: Tensor, corrected: Tensor, confidence: Tensor) -> Tensor:
    """Mix the given label with the vote: r * onehot(given) + (1 - r) * corrected.

    r is the share of the vote for the given label where the vote is sure (confidence 0.5 or more), else one half.

    Args:
        given: [b] int64.
        corrected: [b, C] votes, each row adds up to 1.
        confidence: [b] largest share of a vote.

    Returns:
        [b, C] targets.
    """
    agreement = corrected.gather(1, given[:, None]).squeeze(1)
    trust = torch.where(confidence >= 0.5, agreement, torch.full_like(agreement, 0.5))[:, None]
    return ((1 - trust) * corrected).scatter_add(1, given[:, None], trust)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's cross-entropy with a distribution: [b, C] twice -> [b]."""
    return -(targets * logits.log_softmax(1)).sum(1)


def generalized_cross_entropy(logits: Tensor, targets: Tensor, q: float) -> Tensor:
    """Return sum_c t_c (1 - p_c^q) / q (Zhang and Sabuncu 2018, equation 6): [b, C] twice -> [b].

    Between cross-entropy (q -> 0) and the mean absolute error (q = 1); a wrong label costs 1/q at most.
    """
    powers = (q * logits.log_softmax(1)).exp()
    return (targets * (1 - powers)).sum(1) / q


def early_learning_regularization(logits: Tensor, remembered: Tensor) -> Tensor:
    """Return log(1 - <p, t>) with t the mean of earlier predictions (Liu et al. 2020, equation 6): [b, C] twice -> [b].

    It holds the prediction at what was learnt before wrong labels were fitted.
    """
    p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
    return torch.log1p(-(remembered * p).sum(1).clamp(max=1 - 1e-4))
