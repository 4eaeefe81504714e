"""Features of a clip from the features of its frames, for networks that see one frame at a time.

Legend: B clips, T frames, E feature width.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

NUM_LAYERS, MAX_HEADS = 2, 8


class FramePooling(nn.Module):
    """Mean, attention or transformer over the frames of a clip.

    - mean: the mean over frames.
    - attention: the mean with weights of a softmax over a learned linear score of each frame, which starts as the mean.
    - transformer: two layers with position embeddings, then the mean.
    """

    def __init__(self, kind: Literal["mean", "attention", "transformer"], feature_dim: int, num_frames: int):
        super().__init__()
        self.kind = kind
        if kind == "attention":
            self.score = nn.Linear(feature_dim, 1)
            nn.init.zeros_(self.score.weight)
        if kind == "transformer":
            # Imported late, since importing torchvision takes seconds.
            from torchvision.models.vision_transformer import EncoderBlock

            self.positions = nn.Parameter(torch.randn(1, num_frames, feature_dim) * 0.02)
            heads = math.gcd(MAX_HEADS, feature_dim)
            blocks = (EncoderBlock(heads, feature_dim, 4 * feature_dim, 0.0, 0.0) for _ in range(NUM_LAYERS))
            self.layers = nn.Sequential(*blocks, nn.LayerNorm(feature_dim))

    def forward(self, features: Tensor) -> Tensor:
        """Pool [B, T, E] to [B, E]."""
        if self.kind == "attention":
            return (features * self.score(features).softmax(1)).sum(1)
        if self.kind == "transformer":
            features = self.layers(features + self.positions)
        return features.mean(1)


def encode_frames(net: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """Return the features of all frames: network on images, clip [B, 3, T, H, W] -> [B, T, E]."""
    features = net(clip.transpose(1, 2).flatten(0, 1))
    return features.flatten(1).unflatten(0, (len(clip), -1))
