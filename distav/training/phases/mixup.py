"""Mixup: training on mixtures of two clips and of their targets (Zhang et al. 2018).

Legend: b samples of a rank's batch, C classes.
"""

from dataclasses import dataclass, replace

import torch
from scipy.special import betaincinv
from torch import Tensor

from distav.data.pipeline.loader import Batch
from distav.distributed.rng import uniform

_STREAM = 4
_NUM_QUANTILES = 4096


class Mixup:
    """Draws the fractions of the clips in each mixture from the distribution Beta(alpha, alpha).

    A clip is mixed with the next or the previous one of its batch, and its fraction depends on its own seed. Results
    are therefore the same for any number of ranks whose batches have an even size.

    Args:
        alpha: parameter of the distribution, above 0; the larger, the closer the fractions are to one half.
        device: device of the batches.
    """

    def __init__(self, alpha: float, device: torch.device):
        centers = (torch.arange(_NUM_QUANTILES, dtype=torch.float64) + 0.5) / _NUM_QUANTILES
        self._quantiles = torch.as_tensor(betaincinv(alpha, alpha, centers.numpy())).float().to(device)

    def draw(self, batch: Batch, trained: Tensor | None = None) -> "Mixture":
        """Return the mixture of a batch.

        Two clips are mixed if they have the same modalities and both are trained on; all others remain as they are.

        Args:
            batch: the batch.
            trained: [b] bool, clips that the classifiers are trained on; None: all.
        """
        draws = (uniform(batch.seeds, _STREAM, 1)[:, 0] * _NUM_QUANTILES).long()
        rows = torch.arange(len(batch.ids), device=batch.ids.device)
        usable = batch.valid if trained is None else batch.valid & trained
        # 0: not mixed.
        kind = usable * (1 + batch.present["visual"].long() + 2 * batch.present["audio"].long())
        partners = (rows ^ 1).clamp(max=len(rows) - 1)
        mixed = (partners != rows) & (kind > 0) & (kind == kind[partners])
        return Mixture(torch.where(mixed, self._quantiles[draws], 1.0), torch.where(mixed, partners, rows))


@dataclass(frozen=True)
class Mixture:
    """The mixture of a batch.

    Attributes:
        fractions: [b] fraction of each clip, in [0, 1]; the rest is of its partner.
        partners: [b] row of the partner; the own row of a clip that is not mixed.
    """

    fractions: Tensor
    partners: Tensor

    def batch(self, batch: Batch) -> Batch:
        """Return the batch with mixed media; rows keep their ids, and the modalities that they have."""
        return replace(batch, media={name: self._mix(values) for name, values in batch.media.items()})

    def targets(self, targets: Tensor) -> Tensor:
        """Return the targets of mixed clips: [b, C] -> [b, C]."""
        return torch.lerp(targets[self.partners], targets, self.fractions[:, None])

    def weights(self, weights: Tensor) -> Tensor:
        """Return the weights of mixed clips in the loss, the products of those of both clips: [b] -> [b].

        The target of a mixture is known only if those of both clips are.
        """
        own_row = self.partners == torch.arange(len(weights), device=weights.device)
        return weights * torch.where(own_row, 1.0, weights[self.partners])

    def _mix(self, values: Tensor) -> Tensor:
        """Return mixed frames, audio or features, in the type of the values: [b, ...]."""
        fractions = self.fractions.view(-1, *[1] * (values.dim() - 1))
        mixed = torch.lerp(values[self.partners].float(), values.float(), fractions)
        return mixed.to(values.dtype) if values.dtype.is_floating_point else mixed.round().to(values.dtype)
