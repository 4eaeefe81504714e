"""Losses for several labels per clip: binary cross-entropy and the asymmetric loss, on soft targets.

Legend: b samples, C classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy, summed over the classes: logits and target probabilities [b, C] -> [b]."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def asymmetric_loss(
    logits: Tensor, targets: Tensor, gamma_negative: float, gamma_positive: float, clip: float
) -> Tensor:
    """Return the asymmetric loss (Ridnik et al. 2021, section 2), summed over the classes: [b].

    With the probability p of a class, and the shifted probability p_m = max(p - clip, 0), the loss of a class with
    target t is

        -t (1 - p)^gamma_positive log p - (1 - t) p_m^gamma_negative log(1 - p_m)

    Absent classes of low probability have little loss, or none below `clip`: they may be missing labels, and there are
    many more of them than present classes. Without focusing and clipping, it is the binary cross-entropy.

    Args:
        logits: [b, C].
        targets: [b, C] probabilities of the classes.
        gamma_negative: focusing exponent of absent classes.
        gamma_positive: focusing exponent of present classes.
        clip: probability margin of absent classes, 0 or more, below 1.
    """
    log_present, log_absent = F.logsigmoid(logits), F.logsigmoid(-logits)
    if clip:
        # log(1 - p + clip), at most 0
        log_absent = torch.logaddexp(log_absent, torch.full_like(log_absent, math.log(clip))).clamp_max(0)
    present, absent = -targets * log_present, -(1 - targets) * log_absent
    if gamma_positive:
        present = present * (gamma_positive * F.logsigmoid(-logits)).exp()
    if gamma_negative:
        # 1 - exp(log(1 - p_m)); its power has no finite gradient at 0 for exponents below 1.
        shifted = -torch.expm1(log_absent)
        absent = absent * shifted.clamp_min(1e-12) ** gamma_negative
    return (present + absent).sum(1)
