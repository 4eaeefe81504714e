"""Labels that follow from a correction."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distav.noise.correction import identity_correction
from distav.noise.noise_rate import (
    CONFORMAL_FACTOR,
    MAX_CAUTION,
    candidate_rates,
    cautious_odds_factor,
    rates_within_prior,
)

CLASSES = 10


def profile(*rates: float) -> Tensor:
    """Return the log-likelihood of a noise rate that is one of some rates, all of them equally likely."""
    candidates = candidate_rates(CLASSES)
    log_likelihood = torch.full_like(candidates, -1e3)
    for rate in rates:
        log_likelihood[(candidates - rate).abs().argmin()] = 0.0
    return log_likelihood


def test_the_required_odds_grow_with_the_uncertainty_of_the_noise_rate():
    # The mean is 0.4, the lower quartile 0.3, and the bound 0.4 - 1.5 x 0.1.
    low = 0.4 - CONFORMAL_FACTOR * 0.1
    assert cautious_odds_factor(profile(0.3, 0.5), CLASSES) == pytest.approx((0.4 / 0.6) / (low / (1 - low)), rel=1e-6)
    assert cautious_odds_factor(profile(0.4), CLASSES) == pytest.approx(1.0)
    factors = [cautious_odds_factor(profile(0.4 - width, 0.4 + width), CLASSES) for width in (0.05, 0.1, 0.2)]
    assert factors == sorted(factors) and factors[0] > 1.2


@pytest.mark.parametrize("rates", [(0.0,), (0.0, 0.9), (0.9,), (0.0, 0.1, 0.9)])
def test_the_required_odds_are_bounded_at_the_bounds_of_the_noise_rate(rates: tuple[float, ...]):
    assert 1 <= cautious_odds_factor(profile(*rates), CLASSES) <= MAX_CAUTION


def test_a_label_is_kept_unless_another_one_is_probable_enough():
    given = torch.zeros(3, dtype=torch.int64)
    posterior = torch.zeros(3, CLASSES)
    posterior[:, :2] = torch.tensor([[0.4, 0.6], [0.25, 0.75], [0.02, 0.98]])
    correction = replace(identity_correction(given, CLASSES), posterior=posterior)
    assert correction.corrected_labels(given, 2.0).tolist() == [0, 1, 1]
    assert replace(correction, caution=2.0).corrected_labels(given, 2.0).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("center", "deviation", "expected"),
    [
        (0.4, 0.01, [0.2, 0.4, 0.6]),
        (0.4, 1e-4, [0.4, 0.6]),
        (0.5, 0.02, [0.4, 0.6]),
        (0.0, 0.01, [0.0, 0.2]),
        (0.9, 1e-4, [0.6, 0.8]),
        (0.3, 10.0, [0.0, 0.2, 0.4, 0.6, 0.8]),
    ],
)
def test_rates_that_an_earlier_correction_excludes_are_left_out(center: float, deviation: float, expected: list[float]):
    positions = candidate_rates(CLASSES)
    prior = -0.5 * ((positions - center) / deviation).square()
    grid = [0.0, 0.2, 0.4, 0.6, 0.8]
    assert rates_within_prior(grid, positions, prior - prior.max()) == expected
    assert rates_within_prior(grid, positions, None) == grid
