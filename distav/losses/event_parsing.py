"""Losses of event parsing: labels of whole videos, and labels that teachers harvested for segments.

Legend: B videos, T segments, C classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _BinaryCrossEntropy(torch.autograd.Function):
    """The value and gradient of `F.binary_cross_entropy`, NaN where the probability is not one.

    PyTorch's own checks the range on the device, and a failed check there ends the process, not the step.
    """

    @staticmethod
    def forward(ctx: Any, probability: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(probability, target)
        right, wrong = probability.log().clamp_min(-100), torch.log1p(-probability).clamp_min(-100)
        return (target - 1) * wrong - target * right

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probability, target = ctx.saved_tensors
        return gradients[0] * (probability - target) / (probability * (1 - probability)).clamp_min(1e-12), None


def binary_cross_entropy(probability: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of each probability, with logarithms of at least -100, in float32.

    Args:
        probability: of any shape; the result is NaN where it is NaN or outside 0..1.
        target: of the same shape, 0..1; no gradient.
    """
    return _BinaryCrossEntropy.apply(probability.float(), target.float())  # pyright: ignore[reportReturnType]


def video_losses(probability: Tensor, weak: Tensor) -> Tensor:
    """Return the binary cross-entropy with labels of whole videos, the mean over classes: [B, C] twice -> [B]."""
    return binary_cross_entropy(probability, weak).mean(dim=1)


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
    targets = torch.stack([(1 - share) * weak.float() + share / 2 for share in smoothing], dim=1)
    return binary_cross_entropy(probability, targets).mean(dim=2).sum(dim=1)


def segment_losses(logits: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Return VALOR's losses with harvested labels, the mean over segments and classes and the sum over modalities.

    Args:
        logits: [B, 2, T, C].
        pseudo_labels: [B, 2, T, C] bool or shares.

    Returns:
        [B].
    """
    each = F.binary_cross_entropy_with_logits(logits.float(), pseudo_labels.float(), reduction="none")
    return each.mean(dim=(2, 3)).sum(dim=1)
