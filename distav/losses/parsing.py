"""Losses of event parsing: labels of whole videos, and labels that teachers harvested for segments.

Legend: B videos, T segments, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def video_losses(probability: Tensor, weak: Tensor) -> Tensor:
    """Return the binary cross-entropy with labels of whole videos, the mean over classes: [B, C] twice -> [B]."""
    return F.binary_cross_entropy(probability.float(), weak.float(), reduction="none").mean(dim=1)


def modality_losses(probability: Tensor, weak: Tensor, smoothing: tuple[float, float] = (0.0, 0.1)) -> Tensor:
    """Return HAN's losses of each modality: the video's labels are asked of sound and picture alike.

    Labels may be of the other modality alone, so those of pictures are smoothed to (1 - s) y + s / 2 (HAN's
    published code: s = 0.1).

    Args:
        probability: [B, 2, C] of what is heard and seen.
        weak: [B, C].
        smoothing: s of sounds and of pictures.

    Returns:
        [B], the sum over both.
    """
    share = torch.tensor(smoothing, device=weak.device)[:, None]
    targets = (1 - share) * weak[:, None].float() + share / 2
    each = F.binary_cross_entropy(probability.float(), targets, reduction="none")
    return each.mean(dim=2).sum(dim=1)


def segment_losses(logits: Tensor, harvested: Tensor) -> Tensor:
    """Return VALOR's losses with harvested labels, the mean over segments and classes and the sum over modalities.

    Args:
        logits: [B, 2, T, C].
        harvested: [B, 2, T, C] bool or shares.

    Returns:
        [B].
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), harvested.float(), reduction="none")
    return each.mean(dim=(2, 3)).sum(dim=1)
