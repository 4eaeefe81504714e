"""Heads of the towers: projections, categories, classifiers.

Legend: B clips, E tower width, D embedding width, K categories, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distav.models.layers import GlobalBatchNorm, SeededDropout

DROPOUT_STREAM = 2
"""First stream of a sample's random numbers for the dropout of its features."""


def _mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU in between, preceded by a normalization over the global batch.

    Tower outputs are mostly positive and nearly identical at initialization. Without the normalization, the embeddings
    of all samples start at the same point, and rows of the memory bank differ only by their age.
    """
    layers: list[nn.Module] = [GlobalBatchNorm(widths[0])]
    for in_dim, out_dim in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Projection(nn.Module):
    """Three layers and normalization to unit length (AVID section 3, which has no normalization before the layers)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.layers = _mlp(in_dim, hidden_dim, hidden_dim, out_dim).append(GlobalBatchNorm(out_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Project [B, E] to unit vectors [B, D] float32."""
        return F.normalize(self.layers(features).float(), dim=1)


class CategoryHead(nn.Module):
    """Two layers to K category logits; each modality has its own head (Li et al. 2021 use one for both views)."""

    def __init__(self, in_dim: int, hidden_dim: int, num_categories: int):
        super().__init__()
        self.layers = _mlp(in_dim, hidden_dim, num_categories)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [B, K] float32."""
        return self.layers(features).float()


class Classifiers(nn.Module):
    """A classifier on the features of both modalities, and one per modality for mismatched pairs."""

    def __init__(self, visual_dim: int, audio_dim: int, num_classes: int, dropout: float):
        super().__init__()
        self.both = nn.Linear(visual_dim + audio_dim, num_classes)
        self.visual = nn.Linear(visual_dim, num_classes)
        self.audio = nn.Linear(audio_dim, num_classes)
        self.drop_visual = SeededDropout(dropout, DROPOUT_STREAM)
        self.drop_audio = SeededDropout(dropout, DROPOUT_STREAM + 1)

    def forward(self, visual: Tensor, audio: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits from both, visual and audio features, each [B, C] float32."""
        visual, audio = self.drop_visual(visual, seeds), self.drop_audio(audio, seeds)
        both = self.both(torch.cat([visual, audio], dim=1))
        return both.float(), self.visual(visual).float(), self.audio(audio).float()
