"""Losses of event parsing, on weak labels of videos and on pseudo-labels of segments.

Legend: B videos, T segments, C classes. Axes of length 2 are in the order of `distav.data.modalities.MODALITIES`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _BinaryCrossEntropy(torch.autograd.Function):
    """Value and gradient of `F.binary_cross_entropy`; NaN where the probability is outside 0..1.

    The range check of PyTorch's own function runs on the device, where a failure ends the process and not the step.
    """

    @staticmethod
    def forward(ctx: Any, probability: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(probability, target)
        log_p, log_not_p = probability.log().clamp_min(-100), torch.log1p(-probability).clamp_min(-100)
        return (target - 1) * log_not_p - target * log_p

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probability, target = ctx.saved_tensors
        return gradients[0] * (probability - target) / (probability * (1 - probability)).clamp_min(1e-12), None


def binary_cross_entropy(probability: Tensor, target: Tensor) -> Tensor:
    """Return the elementwise binary cross-entropy in float32, with logarithms clamped to -100.

    Args:
        probability: any shape; the result is NaN where it is NaN or outside 0..1.
        target: same shape, 0..1; no gradient.
    """
    return _BinaryCrossEntropy.apply(probability.float(), target.float())  # pyright: ignore[reportReturnType]


def video_losses(probability: Tensor, weak_labels: Tensor) -> Tensor:
    """Return the binary cross-entropy with weak labels, averaged over classes: [B].

    Args:
        probability: [B, C] class probabilities of the videos.
        weak_labels: [B, C].
    """
    return binary_cross_entropy(probability, weak_labels).mean(dim=1)


def modality_losses(probability: Tensor, weak_labels: Tensor, smoothing: tuple[float, float] = (0.0, 0.1)) -> Tensor:
    """Return HAN's loss, which applies the video's weak labels to each modality, summed over modalities: [B].

    An event may occur in one modality only, so labels are smoothed to (1 - s) y + s / 2 (HAN's published code: s = 0.1
    for the visual modality).

    Args:
        probability: [B, 2, C] class probabilities of each modality.
        weak_labels: [B, C].
        smoothing: s of the audio and of the visual modality.
    """
    targets = torch.stack([(1 - s) * weak_labels.float() + s / 2 for s in smoothing], dim=1)
    return binary_cross_entropy(probability, targets).mean(dim=2).sum(dim=1)


def segment_losses(logits: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Return VALOR's loss on pseudo-labels, averaged over segments and classes and summed over modalities: [B].

    Args:
        logits: [B, 2, T, C].
        pseudo_labels: [B, 2, T, C], bool or probabilities.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), pseudo_labels.float(), reduction="none")
    return losses.mean(dim=(2, 3)).sum(dim=1)
