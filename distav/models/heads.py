"""Heads on top of the towers: projections, categories, classifiers.

Legend: B clips, E tower width, D embedding width, K categories, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.models.layers import GlobalBatchNorm, SeededDropout

DROPOUT_STREAM = 2
"""First of the streams of a sample's random numbers that drop features."""


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between, behind a normalisation over the global batch.

    Tower outputs are mostly positive and much alike at first. Unless their common part is taken away, the embeddings of
    all samples start as one, and rows of the bank differ by nothing but their age.
    """
    layers: list[nn.Module] = [GlobalBatchNorm(widths[0])]
    for inside, outside in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Projection(nn.Module):
    """Three layers to unit length (AVID section 3, which has no normalisation before them)."""

    def __init__(self, inside: int, hidden: int, outside: int):
        super().__init__()
        self.layers = _layers(inside, hidden, hidden, outside).append(GlobalBatchNorm(outside))

    def forward(self, features: Tensor) -> Tensor:
        """Project [B, E] to unit vectors [B, D] float32."""
        return F.normalize(self.layers(features).float(), dim=1)


class CategoryHead(nn.Module):
    """Two layers to K category logits; each modality has its own (Li et al. 2021 share one between like views)."""

    def __init__(self, inside: int, hidden: int, num_categories: int):
        super().__init__()
        self.layers = _layers(inside, hidden, num_categories)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, K] float32."""
        return self.layers(features).float()


class Classifiers(nn.Module):
    """A classifier over both features, and one for each modality that serves where sound and picture differ."""

    def __init__(self, visual_dim: int, audio_dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.both = nn.Linear(visual_dim + audio_dim, num_classes)
        self.visual = nn.Linear(visual_dim, num_classes)
        self.audio = nn.Linear(audio_dim, num_classes)
        self.drop_visual = SeededDropout(dropout, DROPOUT_STREAM)
        self.drop_audio = SeededDropout(dropout, DROPOUT_STREAM + 1)

    def forward(self, visual: Tensor, audio: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits over both, visual and audio features, each [B, C] float32."""
        visual, audio = self.drop_visual(visual, seeds), self.drop_audio(audio, seeds)
        both = self.both(torch.cat([visual, audio], dim=1))
        return both.float(), self.visual(visual).float(), self.audio(audio).float()
