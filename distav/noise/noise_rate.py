"""Noise rates, overall and by class, with 95 % intervals, and the noise transition matrix.

Legend: N samples, n samples of this rank, C classes, R rates.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.probabilities import normalize_likelihood, normalize_rows
from distav.noise.tiling import tiles

NUM_RATES = 181
"""R, the number of candidate rates."""
CAUTIOUS_LEVEL = 0.25
"""Quantile of a noise rate at which labels must still be wrong to be changed; see `cautious_odds_factor`."""
NEGLIGIBLE_DIFFERENCE = 12.0
"""Difference of a tempered log-likelihood to its maximum from which on a rate is negligible."""
MAX_INTERVAL_WIDTH = 0.5
"""Width of a 95 % interval above which a noise rate counts as not identified."""
CONFORMAL_FACTOR = 1.5
"""Factor on the distances of the bounds of an interval from the estimate. The model does not describe all noise, so its
likelihood is too certain. As in split conformal prediction (Lei et al. 2018, section 2.2), the factor is such that the
intervals cover the true rates of nine tenths of the calibration problems, those of `tools/bench.py coverage`."""

MAX_CAUTION = 5.0
"""Largest factor of `cautious_odds_factor`; without it, no label would change if the rate may be 0."""

TEMPERATURE, INTERVAL_SLOPE, AVERAGE_SLOPE = 4.0, 32.0, 4.0
"""Temperature of a profile if the classes are certain, and its relative increase per square of the mean entropy, which
is 1 for uniform class probabilities, in intervals and in averages over the rates: each label enters the composite
likelihood twice, and the more diffuse the votes are, the more a misfit of the model counts. Labels that are corrected
at the likely rates are more accurate than an average over all rates of a wide interval."""


def profile_temperature(entropy: float, slope: float) -> float:
    """Return the temperature of a log-likelihood; see `TEMPERATURE`."""
    return TEMPERATURE * (1 + slope * entropy**2)


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

    def as_dict(self) -> dict[str, float]:
        """Return the values, rounded for a report."""
        return {name: round(getattr(self, name), 4) for name in ("estimate", "ci95_low", "ci95_high")}


def estimate_rate(log_likelihood: Tensor, num_classes: int) -> RateEstimate:
    """Return the posterior mean of a rate under a uniform prior, and its 95 % interval; see `CONFORMAL_FACTOR`.

    Args:
        log_likelihood: [R] over `candidate_rates(C)`.
        num_classes: C.
    """
    return RateEstimate(*_mean_and_quantiles(log_likelihood, num_classes, 0.025, 0.975))


def cautious_odds_factor(log_likelihood: Tensor, num_classes: int) -> float:
    """Return how many times more probable a class must be for its label to be changed if the noise rate is uncertain.

    It is used where the mismatch rate of the pairs is not identified: a label that names the class of the other
    modality then looks wrong, and the noise is overestimated.

    If the noise rate is r, the odds that a label is wrong are proportional to r / (1 - r). The factor is these odds at
    the estimate, divided by those at the lower quartile of the rate, the bound of an interval like those of
    `estimate_rate`.

    Args:
        log_likelihood: [R] over `candidate_rates(C)`.
        num_classes: C.

    Returns:
        1 if the rate is certain, up to `MAX_CAUTION` otherwise.
    """
    estimate, low = _mean_and_quantiles(log_likelihood, num_classes, CAUTIOUS_LEVEL)
    if low <= 0:
        return MAX_CAUTION if estimate > 0 else 1.0
    return min(max(1.0, estimate / (1 - estimate) * (1 - low) / low), MAX_CAUTION)


def _mean_and_quantiles(log_likelihood: Tensor, num_classes: int, *levels: float) -> list[float]:
    """Return the posterior mean of a rate, and quantiles, moved away from it by `CONFORMAL_FACTOR`."""
    rates = candidate_rates(num_classes).to(log_likelihood.device)
    posterior = normalize_likelihood(log_likelihood)
    cumulative, mean = posterior.cumsum(0), float(posterior @ rates)
    quantiles = (float(rates[int((cumulative >= level).nonzero()[0, 0])]) for level in levels)
    moved = (mean + CONFORMAL_FACTOR * (quantile - mean) for quantile in quantiles)
    return [mean, *(min(max(bound, 0.0), float(rates[-1])) for bound in moved)]


def unknown_rate(num_classes: int) -> RateEstimate:
    """Return the estimate of a rate of which nothing is known: all candidate rates are equally likely."""
    return estimate_rate(torch.zeros_like(candidate_rates(num_classes)), num_classes)


def interpolate_profile(rates: Sequence[float], log_likelihood: Tensor, positions: Tensor) -> Tensor:
    """Return a profile likelihood at other rates, interpolated monotonically: [G], [R] -> [R] float64.

    Args:
        rates: G increasing rates.
        log_likelihood: [G] at these rates.
        positions: [R] rates; outside the range of `rates`, the value at the nearest of them is returned.
    """
    # Imported late, since importing scipy.interpolate takes a second.
    from scipy.interpolate import PchipInterpolator

    curve = PchipInterpolator(np.asarray(rates), log_likelihood.double().cpu().numpy())
    clamped = positions.double().cpu().numpy().clip(rates[0], rates[-1])
    return torch.from_numpy(curve(clamped)).to(positions.device)


def rates_within_prior(grid: Sequence[float], positions: Tensor, prior: Tensor | None) -> list[float]:
    """Return the rates of a grid between which the prior is not negligible, and those that bound this range.

    Args:
        grid: increasing rates.
        positions: [R] increasing rates.
        prior: [R] their log-probability, maximum 0; None: all rates are returned.
    """
    if prior is None:
        return list(grid)
    likely = positions[(prior.cpu() > -NEGLIGIBLE_DIFFERENCE).nonzero().squeeze(1)]
    first = min(max(bisect_right(grid, float(likely[0])) - 1, 0), len(grid) - 2)
    last = max(bisect_left(grid, float(likely[-1])), first + 1)
    return list(grid[first : last + 1])


def transition_matrix(posterior: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the noise transition matrix that follows from class probabilities.

    Args:
        posterior: [n, C] class probabilities of this rank's samples given the labels.
        labels: [n] int64 given labels.
        counted: [n] bool, samples to count; all by default.

    Returns:
        [C, C + 1] float64: P(given | true), and the expected number of samples of each class in the last column.
    """
    num_classes = posterior.shape[1]
    counts = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=posterior.device)
    for part in tiles(len(posterior), num_classes, posterior.device):
        probs = posterior[part].double()
        if counted is not None:
            probs *= counted[part, None]
        counts.index_add_(0, labels[part], probs)
    counts = all_reduce_sum_(counts).T
    return torch.cat([normalize_rows(counts), counts.sum(1, keepdim=True)], dim=1)


def class_rates(matrix: Tensor, overall: RateEstimate) -> list[RateEstimate]:
    """Return the noise rate of each class with a 95 % interval.

    Intervals are those of a Beta distribution, widened by the relative width of the overall interval.

    Args:
        matrix: [C, C + 1] result of `transition_matrix`.
        overall: noise rate of all samples.
    """
    low_ratio = min(overall.ci95_low / max(overall.estimate, 1e-9), 1.0)
    high_ratio = min((1 - overall.ci95_high) / max(1 - overall.estimate, 1e-9), 1.0)
    estimates = []
    for correct, count in zip(matrix.diagonal().tolist(), matrix[:, -1].tolist(), strict=True):
        wrong = 1 - correct
        low, high = betaincinv(0.5 + wrong * count, 0.5 + correct * count, [0.025, 0.975]).tolist()
        estimates.append(RateEstimate(wrong, low * low_ratio, 1 - (1 - high) * high_ratio))
    return estimates
