"""The transformer of the visual and the audio ViT (blocks from torchvision).

Legend: B clips, L tokens, E width.
"""

import torch
from torch import Tensor, nn

VIT_SIZES = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}
"""Width, depth and heads by name (Dosovitskiy et al. 2021; tiny and small: Touvron et al. 2021)."""


class TokenEncoder(nn.Module):
    """Position embeddings, transformer blocks and the mean over tokens."""

    def __init__(self, size: str, num_tokens: int):
        super().__init__()
        # Imported late, since importing torchvision takes seconds.
        from torchvision.models.vision_transformer import EncoderBlock

        width, depth, heads = VIT_SIZES[size]
        self.feature_dim = width
        self.positions = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(heads, width, 4 * width, 0.0, 0.0) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode [B, L, E] to [B, E]."""
        return self.norm(self.blocks(tokens + self.positions)).mean(dim=1)
