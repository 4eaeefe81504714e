"""Labels that follow from a correction."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distav.noise.correction import identity_correction
from distav.noise.noise_rate import CONFORMAL_FACTOR, candidate_rates, cautious_odds_factor

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
def test_the_required_odds_are_finite_at_the_bounds_of_the_noise_rate(rates: tuple[float, ...]):
    assert 1 <= cautious_odds_factor(profile(*rates), CLASSES) < 1e6


def test_a_label_is_kept_if_it_is_wrong_only_at_a_large_noise_rate():
    given = torch.zeros(3, dtype=torch.int64)
    posterior = torch.zeros(3, CLASSES)
    posterior[:, :2] = torch.tensor([[0.4, 0.6], [0.25, 0.75], [0.02, 0.98]])
    correction = replace(identity_correction(given, CLASSES), posterior=posterior)
    certain = replace(correction, rate_log_likelihood=profile(0.4))
    uncertain = replace(correction, rate_log_likelihood=profile(0.3, 0.5))
    assert certain.corrected_labels(given, 2.0).tolist() == [0, 1, 1]
    assert uncertain.change_odds(2.0) == pytest.approx(4.0, rel=1e-6)
    assert uncertain.corrected_labels(given, 2.0).tolist() == [0, 0, 1]
