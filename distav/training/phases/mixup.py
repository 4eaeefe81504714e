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
    """Draws the shares of the clips in each mixture from the distribution Beta(alpha, alpha).

    A clip is mixed with its neighbor in the batch, and its share depends on its own seed. Results are therefore the
    same on any number of ranks whose batches have an even size.

    Args:
        alpha: parameter of the distribution, above 0; the larger, the closer the shares are to one half.
        device: device of the batches.
    """

    def __init__(self, alpha: float, device: torch.device):
        centers = (torch.arange(_NUM_QUANTILES, dtype=torch.float64) + 0.5) / _NUM_QUANTILES
        self._quantiles = torch.as_tensor(betaincinv(alpha, alpha, centers.numpy())).float().to(device)

    def draw(self, seeds: Tensor) -> "Mixture":
        """Return the mixture of a batch with the seeds [b] int64; an odd last clip is not mixed."""
        draws = (uniform(seeds, _STREAM, 1)[:, 0] * _NUM_QUANTILES).long()
        rows = torch.arange(len(seeds), device=seeds.device)
        return Mixture(self._quantiles[draws], (rows ^ 1).clamp(max=len(seeds) - 1))


@dataclass(frozen=True)
class Mixture:
    """The mixture of a batch.

    Attributes:
        shares: [b] share of each clip, in [0, 1]; the rest is of its partner.
        partners: [b] row of the partner.
    """

    shares: Tensor
    partners: Tensor

    def batch(self, batch: Batch) -> Batch:
        """Return the batch with mixed media; rows keep their ids, and the modalities that they have."""
        return replace(batch, media={name: self._mix(values) for name, values in batch.media.items()})

    def targets(self, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets [b, C] of mixed clips, and their weights in the loss [b].

        The weight is the mixture of the weights of both clips, and each target counts in proportion to its part of it:
        a clip without weight, such as one without sound for the audio classifier, does not change a target.
        """
        own = self.shares * weights
        other = (1 - self.shares) * weights[self.partners]
        total = own + other
        fraction = torch.where(total > 0, own / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)[:, None]
        return fraction * targets + (1 - fraction) * targets[self.partners], total

    def _mix(self, values: Tensor) -> Tensor:
        """Return mixed frames, audio or features, in the type of the values: [b, ...]."""
        shares = self.shares.view(-1, *[1] * (values.dim() - 1))
        mixed = torch.lerp(values[self.partners].float(), values.float(), shares)
        return mixed.to(values.dtype) if values.dtype.is_floating_point else mixed.round().to(values.dtype)
