"""Estimators of the correspondence of a pair: the probability that its sound belongs to its picture.

Legend: N pairs.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.noise.tiling import in_tiles, tiles

NUM_ITERATIONS = 50
VARIANCE_FLOOR = 1e-4
SMALLEST_SHARE = 0.02


@dataclass(frozen=True)
class Mixture:
    """Two Gaussians fitted to pair similarities; the first has the lower mean."""

    means: tuple[float, float]
    variances: tuple[float, float]
    weights: tuple[float, float]

    @property
    def says_clean(self) -> bool:
        """Whether the two are too alike, or the lower too rare, to speak of mismatched pairs."""
        pooled = math.sqrt(sum(share * var for share, var in zip(self.weights, self.variances, strict=True)))
        return self.means[1] - self.means[0] < pooled or self.weights[0] < SMALLEST_SHARE


def fit_mixture(similarity: Tensor) -> Mixture:
    """Fit two Gaussians by expectation-maximisation in float64.

    Starts from the 10th and 90th percentile with equal shares and one variance.

    Args:
        similarity: [N] finite values.
    """
    # torch.quantile takes 2^24 values at most.
    ends = np.quantile(similarity.double().cpu().numpy(), [0.1, 0.9])
    mean = torch.from_numpy(ends).to(similarity.device)
    var = similarity.double().var(correction=0).clamp_min(VARIANCE_FLOOR).expand(2)
    share = torch.full_like(mean, 0.5)
    for _ in range(NUM_ITERATIONS):
        moments = mean.new_zeros(2, 3)
        for part in tiles(len(similarity), 4, similarity.device):
            s = similarity[part].double()
            powers = torch.stack([torch.ones_like(s), s, s.square()], dim=1)
            moments.addmm_(_log_joint(s, mean, var, share).softmax(1).T, powers)
        mass = moments[:, 0].clamp_min(1e-12)
        mean = moments[:, 1] / mass
        var = (moments[:, 2] / mass - mean.square()).clamp_min(VARIANCE_FLOOR)
        share = mass / mass.sum()
    low, high = mean.argsort().tolist()
    return Mixture(*((float(each[low]), float(each[high])) for each in (mean, var, share)))


def _log_joint(s: Tensor, mean: Tensor, var: Tensor, share: Tensor) -> Tensor:
    return share.log() - 0.5 * var.log() - (s[:, None] - mean) ** 2 / (2 * var)


def gmm_correspondence(similarity: Tensor) -> tuple[Tensor, Mixture]:
    """Return the posterior of the higher Gaussian, made monotone: 1 above its mean, 0 below the lower mean.

    Args:
        similarity: [N] pair similarities.

    Returns:
        [N] float32 in 0..1, all 1 where the data look clean, and the mixture.
    """
    mixture = fit_mixture(similarity)
    if mixture.says_clean:
        return torch.ones_like(similarity), mixture
    fitted = torch.tensor([mixture.means, mixture.variances, mixture.weights], dtype=torch.float64)
    parts = fitted.to(similarity.device)

    def posterior(some: Tensor) -> Tensor:
        s = some.double()
        upper = _log_joint(s, *parts).softmax(1)[:, 1]
        return upper.masked_fill_(s >= mixture.means[1], 1.0).masked_fill_(s <= mixture.means[0], 0.0).float()

    return in_tiles(4, posterior, similarity), mixture


def cdf_correspondence(similarity: Tensor, kappa: float = 0.5, delta: float = 0.0) -> Tensor:
    """Return RAVID's normal CDF of the similarity: Phi((s - mu - delta sigma) / (sqrt(kappa) sigma)).

    Its mean is one half whatever the share of wrong pairs, so it ranks pairs and does not count them.

    Args:
        similarity: [N] pair similarities.
        kappa, delta: width and shift (RAVID equation 4).
    """
    s = similarity.double()
    mean, std = s.mean(), s.std(correction=0).clamp_min(1e-6)
    return torch.special.ndtr((s - mean - delta * std) / (math.sqrt(kappa) * std)).float()


@dataclass(frozen=True)
class SelfRefinement:
    """Self-refining correspondence correction (CRCL; Qin et al. 2023): an average over a pair's visits.

    In the first phase that refines, correspondences are 1 up to the last epoch of the warm-up and are then replaced by
    that epoch's matching probabilities; later phases start with what was stored and leave it alone for as long.

    Attributes:
        momentum: beta, share of the old correspondence kept at each visit.
        warmup_epochs: e_w, epochs at the start of a phase.
        threshold: epsilon; a correspondence below it counts as 0.
        store_thresholded: store that 0, from which a pair hardly comes back, as the published code does.
    """

    momentum: float = 0.8
    warmup_epochs: int = 2
    threshold: float = 0.1
    store_thresholded: bool = False

    def trusted(self, stored: Tensor, full: float = 1.0) -> Tensor:
        """Return what the loss believes of stored correspondences, those from `full` up wholly."""
        share = (stored / full).clamp_max(1.0)
        return share.masked_fill(share < self.threshold, 0.0)

    def update(
        self, stored: Tensor, matching: Tensor, epoch: int, first: bool, full: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return what to believe of pairs at a visit, and what to store of them.

        Args:
            stored: correspondences, of any shape.
            matching: matching probabilities found at this visit.
            epoch: of the phase, from 0.
            first: whether no phase before has refined.
            full: matching probability from which a pair is believed wholly; CRCL: 1.
        """
        if epoch < self.warmup_epochs:
            estimated = first and epoch == self.warmup_epochs - 1
            return self.trusted(stored, full), matching if estimated else stored
        average = torch.lerp(matching, stored, self.momentum)
        believed = self.trusted(average, full)
        return believed, average.masked_fill(believed == 0, 0.0) if self.store_thresholded else average


def sample_weights(correspondence: Tensor, smallest: float) -> Tensor:
    """Return loss weights w = w_min + (1 - w_min) c; above 0, or a pair once doubted could never recover."""
    return smallest + (1 - smallest) * correspondence
