"""Features of clips with several classes, their true labels, and labels with missing and wrong ones."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MultiLabelScene:
    """Clips whose features are sums of the directions of their classes.

    Attributes:
        spaces: visual and audio features [N, E] by space.
        true, given: [N, C] bool.
        groups: [N] int64.
        has_modality: [N] bool by modality.
    """

    spaces: dict[str, tuple[Tensor, Tensor]]
    true: Tensor
    given: Tensor
    groups: Tensor
    has_modality: dict[str, Tensor]

    @property
    def missing_rates(self) -> Tensor:
        """Rate of missing labels of each class, [C]."""
        return (self.true & ~self.given).sum(0) / self.true.sum(0)

    @property
    def wrong_rates(self) -> Tensor:
        """Rate of wrong labels of each class, [C]."""
        return (self.given & ~self.true).sum(0) / (~self.true).sum(0)


def multi_label_scene(
    num_clips: int = 1500,
    frequencies: tuple[float, ...] = (0.5, 0.4, 0.3, 0.2, 0.15, 0.1),
    missing: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.3, 0.3),
    wrong: tuple[float, ...] = (0.02, 0.05, 0.08, 0.02, 0.04, 0.03),
    spread: float = 0.35,
    seed: int = 0,
) -> MultiLabelScene:
    """Draw a scene; `spread` is the noise of the features relative to the directions of the classes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    num_classes = len(frequencies)
    true = uniform(num_clips, num_classes) < torch.tensor(frequencies)
    removed, added = (uniform(num_clips, num_classes) < torch.tensor(rates) for rates in (missing, wrong))
    given = (true & ~removed) | (~true & added)
    features = []
    for _ in range(2):
        directions = torch.linalg.qr(torch.randn(16, num_classes, generator=generator))[0].T
        noise = spread * torch.randn(num_clips, 16, generator=generator)
        features.append(true.float() @ directions + noise)
    present = torch.ones(num_clips, dtype=torch.bool)
    return MultiLabelScene(
        {"towers": (features[0], features[1])},
        true,
        given,
        torch.arange(num_clips),
        {"visual": present, "audio": present.clone()},
    )
