"""The transformer that both ViT towers share (blocks from torchvision).

Legend: B clips, L tokens, E width.
"""

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock

from distav.config.errors import UserError, did_you_mean, format_list
from distav.models.layers import run

SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}
"""Width, depth and heads of each size (Dosovitskiy et al. 2021; tiny and small: Touvron et al. 2021)."""


class TokenEncoder(nn.Module):
    """Positions, blocks, and the mean of the tokens."""

    def __init__(self, size: str, num_tokens: int, recompute: bool):
        super().__init__()
        width, depth, heads = SIZES[size]
        self.feature_dim = width
        self.recompute = recompute
        self.positions = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.blocks = nn.ModuleList(EncoderBlock(heads, width, 4 * width, 0.0, 0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode [B, L, E] to [B, E]."""
        return self.norm(run(self.blocks, tokens + self.positions, self.recompute)).mean(dim=1)


def unknown_tower(key: str, name: str, others: tuple[str, ...]) -> UserError:
    """Return the error for a tower that does not exist."""
    allowed = [*others, *SIZES]
    return UserError(f"{key}={name} is no tower; allowed: {format_list(allowed)}.{did_you_mean(name, allowed)}")
