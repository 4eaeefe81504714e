"""How many labels are wrong, in all and of each class, with intervals.

Legend: N samples, n samples of this rank, C classes, R rates.
"""

from dataclasses import dataclass

import torch
from scipy.stats import beta
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.tiling import normalized, tiles

NUM_RATES = 91
"""Rates that are tried."""
MATRIX_PRIOR = 10.0
"""Samples of each class for which the even noise matrix counts."""


def rates(num_classes: int) -> Tensor:
    """Return the noise rates that are tried, from none to labels that say nothing: [R] float64."""
    return torch.linspace(0, (num_classes - 1) / num_classes, NUM_RATES, dtype=torch.float64)


@dataclass(frozen=True)
class RateEstimate:
    """A noise rate.

    Attributes:
        rate: posterior mean.
        low, high: ends of the 95 % interval.
    """

    estimate: float
    ci95_low: float
    ci95_high: float

    def spanning(self, other: "RateEstimate") -> "RateEstimate":
        """Return the same rate with an interval that spans the other's too."""
        return RateEstimate(self.estimate, min(self.ci95_low, other.ci95_low), max(self.ci95_high, other.ci95_high))

    def as_dict(self) -> dict[str, float]:
        """Return it rounded for a report."""
        return {name: round(getattr(self, name), 4) for name in ("estimate", "ci95_low", "ci95_high")}


def estimate_rate(evidence: Tensor, at: Tensor) -> RateEstimate:
    """Summarise a log-likelihood [R] over the rates `at` [R]."""
    mass = (evidence - evidence.max()).exp()
    mass = mass / mass.sum()
    below = mass.cumsum(0)
    low, high = (float(at[int((below >= share).nonzero()[0, 0])]) for share in (0.025, 0.975))
    return RateEstimate(float(mass @ at), low, high)


def uniform_transition_matrix(rate: float, num_classes: int) -> Tensor:
    """Return T[c, y] where classes are mistaken at this rate, for any other alike: [C, C]."""
    matrix = torch.full((num_classes, num_classes), rate / (num_classes - 1))
    return matrix.fill_diagonal_(1 - rate)


def estimate_transition_matrix(
    shares: Tensor, own: Tensor, rate: float, confusion: Tensor, iterations: int = 30
) -> tuple[Tensor, Tensor]:
    """Estimate how classes are mistaken, and each sample's true class given its label (Bayes' rule).

    Expectation-maximisation over T[c, y] = P(given y | true c), drawn towards (1 - e) I + e D by `MATRIX_PRIOR`
    samples a class, with e the share of labels found wrong.

    Args:
        shares: [n, C] calibrated shares without the own label.
        own: [n] int64 given labels.
        rate: e where it starts.
        confusion: [C, C] D.
        iterations: of the expectation-maximisation.

    Returns:
        [n, C] posteriors and [C, C + 1]: T, and in the last column how many samples are of each class.
    """
    confusion = confusion.double()
    itself, num_classes = torch.eye(len(confusion), dtype=confusion.dtype, device=confusion.device), len(confusion)
    matrix = torch.lerp(itself, confusion, rate)
    posterior = torch.empty_like(shares)
    counts = matrix
    for iteration in range(iterations):
        by_label, counts = matrix.T.contiguous(), torch.zeros_like(matrix)
        for part in tiles(len(shares), num_classes, shares.device):
            some = shares[part] * by_label[own[part]]
            some /= some.sum(1, keepdim=True).clamp_min(1e-30)
            counts.index_add_(0, own[part], some)
            if iteration + 1 == iterations:
                posterior[part] = some
        counts = all_reduce_sum_(counts).T
        wrong = 1 - counts.diagonal().sum() / counts.sum().clamp_min(1e-9)
        matrix = normalized(counts + MATRIX_PRIOR * torch.lerp(itself, confusion, wrong))
    return posterior, torch.cat([matrix, counts.sum(1, keepdim=True)], dim=1)


def class_rates(matrix: Tensor, overall: RateEstimate) -> list[RateEstimate]:
    """Return how often each class is mistaken, from what `noise_matrix` returned.

    Intervals are 95 % Beta ones, widened as far as the rate of all classes may be lower or higher than told.
    """
    found = []
    lower = overall.ci95_low / max(overall.estimate, 1e-9)
    higher = (1 - overall.ci95_high) / max(1 - overall.estimate, 1e-9)
    for right, count in zip(matrix.diagonal().tolist(), matrix[:, -1].tolist(), strict=True):
        wrong = 1 - right
        low, high = beta.ppf([0.025, 0.975], 0.5 + wrong * count, 0.5 + right * count).tolist()
        found.append(RateEstimate(wrong, low * min(lower, 1.0), 1 - (1 - high) * min(higher, 1.0)))
    return found
