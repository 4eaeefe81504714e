"""Noise rates, overall and by class, with 95 % intervals, and the noise transition matrix.

Legend: N samples, n samples of this rank, C classes, R rates.
"""

from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.probabilities import normalize_likelihood, normalize_rows
from distav.noise.tiling import tiles

NUM_RATES = 91
"""R, the number of candidate rates."""
MATRIX_PRIOR = 10.0
"""Weight of the prior transition matrix, in samples per class."""


def candidate_rates(num_classes: int) -> Tensor:
    """Return the candidate noise rates, from 0 to the rate of random labels (C - 1) / C: [R] float64."""
    return torch.linspace(0, (num_classes - 1) / num_classes, NUM_RATES, dtype=torch.float64)


@dataclass(frozen=True)
class RateEstimate:
    """A noise rate.

    Attributes:
        estimate: posterior mean.
        ci95_low, ci95_high: bounds of the 95 % interval.
    """

    estimate: float
    ci95_low: float
    ci95_high: float

    @property
    def ci95_width(self) -> float:
        """Width of the 95 % interval."""
        return self.ci95_high - self.ci95_low

    def spanning(self, other: "RateEstimate") -> "RateEstimate":
        """Return the same estimate with an interval that also covers the interval of `other`."""
        return RateEstimate(self.estimate, min(self.ci95_low, other.ci95_low), max(self.ci95_high, other.ci95_high))

    def as_dict(self) -> dict[str, float]:
        """Return the values, rounded for a report."""
        return {name: round(getattr(self, name), 4) for name in ("estimate", "ci95_low", "ci95_high")}


def estimate_rate(log_likelihood: Tensor, num_classes: int) -> RateEstimate:
    """Return the posterior mean and the 95 % interval of a rate under a uniform prior.

    Args:
        log_likelihood: [R] over `candidate_rates(C)`.
        num_classes: C.
    """
    rates = candidate_rates(num_classes).to(log_likelihood.device)
    posterior = normalize_likelihood(log_likelihood)
    cumulative = posterior.cumsum(0)

    def quantile(level: float) -> float:
        return float(rates[int((cumulative >= level).nonzero()[0, 0])])

    return RateEstimate(float(posterior @ rates), quantile(0.025), quantile(0.975))


def uniform_transition_matrix(rate: float, num_classes: int) -> Tensor:
    """Return T[c, y] of symmetric noise at this rate: [C, C]."""
    matrix = torch.full((num_classes, num_classes), rate / (num_classes - 1))
    return matrix.fill_diagonal_(1 - rate)


def estimate_transition_matrix(
    probs: Tensor, labels: Tensor, rate: float, error_distribution: Tensor, num_iterations: int = 30
) -> tuple[Tensor, Tensor]:
    """Estimate the noise transition matrix and the posterior of each true class given the label (Bayes' rule).

    Expectation-maximization over T[c, y] = P(given y | true c) with the prior (1 - e) I + e D, which counts as
    `MATRIX_PRIOR` samples per class; e is the current noise rate.

    Args:
        probs: [n, C] calibrated held-out class probabilities.
        labels: [n] int64 given labels.
        rate: initial e.
        error_distribution: [C, C] D.
        num_iterations: iterations of expectation-maximization.

    Returns:
        [n, C] posteriors, and [C, C + 1]: T, with the estimated number of samples of each class in the last column.
    """
    error_distribution = error_distribution.double()
    num_classes = len(error_distribution)
    identity = torch.eye(num_classes, dtype=torch.float64, device=error_distribution.device)
    matrix = torch.lerp(identity, error_distribution, rate)
    posterior = torch.empty_like(probs)
    counts = matrix
    for iteration in range(num_iterations):
        by_label, counts = matrix.T.contiguous(), torch.zeros_like(matrix)
        for part in tiles(len(probs), num_classes, probs.device):
            joint = normalize_rows(probs[part] * by_label[labels[part]])
            counts.index_add_(0, labels[part], joint)
            if iteration + 1 == num_iterations:
                posterior[part] = joint
        counts = all_reduce_sum_(counts).T
        current_rate = 1 - counts.diagonal().sum() / counts.sum().clamp_min(1e-9)
        matrix = normalize_rows(counts + MATRIX_PRIOR * torch.lerp(identity, error_distribution, current_rate))
    return posterior, torch.cat([matrix, counts.sum(1, keepdim=True)], dim=1)


def class_rates(matrix: Tensor, overall: RateEstimate) -> list[RateEstimate]:
    """Return the noise rate of each class with a 95 % interval.

    Intervals are those of a Beta distribution, widened by the relative width of the overall interval.

    Args:
        matrix: [C, C + 1] result of `estimate_transition_matrix`.
        overall: noise rate of all samples.
    """
    low_ratio = min(overall.ci95_low / max(overall.estimate, 1e-9), 1.0)
    high_ratio = min((1 - overall.ci95_high) / max(1 - overall.estimate, 1e-9), 1.0)
    estimates = []
    for correct, count in zip(matrix.diagonal().tolist(), matrix[:, -1].tolist(), strict=True):
        wrong = 1 - correct
        low, high = beta.ppf([0.025, 0.975], 0.5 + wrong * count, 0.5 + correct * count).tolist()
        estimates.append(RateEstimate(wrong, low * low_ratio, 1 - (1 - high) * high_ratio))
    return estimates
