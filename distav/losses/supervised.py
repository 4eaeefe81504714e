"""Cross-entropy on given and corrected labels together (phase 2).

Legend: b rows of this rank, C classes.
"""

import torch
import torch.nn.functional as F
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
    return trust * F.one_hot(given, corrected.shape[1]) + (1 - trust) * corrected


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's cross-entropy with a distribution: [b, C] twice -> [b]."""
    return -(targets * logits.log_softmax(1)).sum(1)
