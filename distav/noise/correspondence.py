"""Correspondence probability of a pair from the similarity of its embeddings, or from its matching probabilities.

Legend: N pairs.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distav.noise.tiling import map_tiles, tiles

NUM_ITERATIONS = 50
"""Iterations of expectation-maximization."""
MIN_VARIANCE = 1e-4
MIN_COMPONENT_WEIGHT = 0.02
"""Weight of the lower component below which all pairs count as matching."""


@dataclass(frozen=True)
class Mixture:
    """Mixture of two Gaussians fitted to pair similarities; the first component has the lower mean."""

    means: tuple[float, float]
    variances: tuple[float, float]
    weights: tuple[float, float]

    @property
    def has_single_component(self) -> bool:
        """Whether the components overlap too much, or the lower one is too small, to indicate mismatched pairs."""
        components = zip(self.weights, self.variances, strict=True)
        pooled_std = math.sqrt(sum(weight * variance for weight, variance in components))
        return self.means[1] - self.means[0] < pooled_std or self.weights[0] < MIN_COMPONENT_WEIGHT


def fit_mixture(similarity: Tensor) -> Mixture:
    """Fit two Gaussians by expectation-maximization in float64.

    Initial means are the 10th and 90th percentile, with equal weights and variances.

    Args:
        similarity: [N] finite values.
    """
    # torch.quantile accepts at most 2^24 values.
    percentiles = np.quantile(similarity.double().cpu().numpy(), [0.1, 0.9])
    mean = torch.from_numpy(percentiles).to(similarity.device)
    var = similarity.double().var(correction=0).clamp_min(MIN_VARIANCE).expand(2)
    weight = torch.full_like(mean, 0.5)
    for _ in range(NUM_ITERATIONS):
        moments = mean.new_zeros(2, 3)
        for part in tiles(len(similarity), 4, similarity.device):
            s = similarity[part].double()
            powers = torch.stack([torch.ones_like(s), s, s.square()], dim=1)
            moments.addmm_(_log_joint(s, mean, var, weight).softmax(1).T, powers)
        mass = moments[:, 0].clamp_min(1e-12)
        mean = moments[:, 1] / mass
        var = (moments[:, 2] / mass - mean.square()).clamp_min(MIN_VARIANCE)
        weight = mass / mass.sum()
    means, variances, weights = torch.stack([mean, var, weight])[:, mean.argsort()].tolist()
    return Mixture(tuple(means), tuple(variances), tuple(weights))


def _log_joint(s: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
    """Return the log joint density of similarities and components, up to a constant: [t] -> [t, 2]."""
    return weight.log() - 0.5 * var.log() - (s[:, None] - mean) ** 2 / (2 * var)


def gmm_correspondence(similarity: Tensor) -> tuple[Tensor, Mixture]:
    """Return the posterior of the higher Gaussian, made monotone: 1 above its mean, 0 below the lower mean.

    Args:
        similarity: [N] pair similarities.

    Returns:
        [N] float32 in 0..1, all 1 if the mixture has a single component, and the mixture.
    """
    mixture = fit_mixture(similarity)
    if mixture.has_single_component:
        return torch.ones_like(similarity), mixture
    parameters = torch.tensor([mixture.means, mixture.variances, mixture.weights], dtype=torch.float64)
    mean, var, weight = parameters.to(similarity.device)

    def posterior(values: Tensor) -> Tensor:
        s = values.double()
        upper = _log_joint(s, mean, var, weight).softmax(1)[:, 1]
        return upper.masked_fill_(s >= mixture.means[1], 1.0).masked_fill_(s <= mixture.means[0], 0.0).float()

    return map_tiles(4, posterior, similarity), mixture


def cdf_correspondence(similarity: Tensor, kappa: float = 0.5, delta: float = 0.0) -> Tensor:
    """Return the normal CDF of the similarity, Phi((s - mu - delta sigma) / (sqrt(kappa) sigma)) (RAVID equation 4).

    The mean is one half at any mismatch rate: the result ranks pairs and does not estimate the rate.

    Args:
        similarity: [N] pair similarities.
        kappa: width.
        delta: shift.
    """
    s = similarity.double()
    mean, std = s.mean(), s.std(correction=0).clamp_min(1e-6)
    return torch.special.ndtr((s - mean - delta * std) / (math.sqrt(kappa) * std)).float()


@dataclass(frozen=True)
class SelfRefinement:
    """Self-refining correspondence correction (CRCL, Qin et al. 2023): a moving average over the visits of a pair.

    In the first phase with refinement, correspondences are 1 up to the last warm-up epoch and are then replaced by the
    matching probabilities of that epoch. Later phases keep the stored correspondences during the warm-up.

    Attributes:
        momentum: beta, weight of the stored correspondence at each visit.
        warmup_epochs: e_w, epochs at the start of a phase.
        threshold: epsilon; smaller correspondences count as 0.
        store_thresholded: store that 0, as the published code does; few pairs recover from it.
    """

    momentum: float = 0.8
    warmup_epochs: int = 2
    threshold: float = 0.1
    store_thresholded: bool = False

    def trusted(self, stored: Tensor, full_trust_threshold: float = 1.0) -> Tensor:
        """Return the correspondences that the loss uses: scaled so that the full-trust threshold becomes 1."""
        scaled = (stored / full_trust_threshold).clamp_max(1.0)
        return scaled.masked_fill(scaled < self.threshold, 0.0)

    def update(
        self, stored: Tensor, matching: Tensor, epoch: int, first: bool, full_trust_threshold: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return the correspondences that the loss uses at a visit, and those to store.

        Args:
            stored: correspondences, of any shape.
            matching: matching probabilities at this visit.
            epoch: epoch of the phase, from 0.
            first: whether this is the first phase with refinement.
            full_trust_threshold: matching probability from which on a pair is fully trusted; CRCL: 1.
        """
        if epoch < self.warmup_epochs:
            is_estimated = first and epoch == self.warmup_epochs - 1
            return self.trusted(stored, full_trust_threshold), matching if is_estimated else stored
        average = torch.lerp(matching, stored, self.momentum)
        trusted = self.trusted(average, full_trust_threshold)
        return trusted, average.masked_fill(trusted == 0, 0.0) if self.store_thresholded else average


def sample_weights(correspondence: Tensor, min_weight: float) -> Tensor:
    """Return loss weights w = w_min + (1 - w_min) c; with w_min > 0, the correspondence of a pair can recover."""
    return min_weight + (1 - min_weight) * correspondence
