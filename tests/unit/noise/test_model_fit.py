"""Fits of the latent-variable model to labels with known noise."""

import functools

import pytest
import torch
from torch import Tensor

from distav.noise import model_fit, rate_fit
from distav.noise.composite_likelihood import CompositeLikelihood
from distav.noise.label_correction import VISUAL_OWNERS
from distav.noise.label_model import MISMATCH_GRID, fit_label_model
from distav.noise.model_fit import PairAssumption, Profile, fit_pair_profile, fit_profile
from distav.noise.model_parameters import Votes, join_parameters
from distav.noise.noise_rate import CONFORMAL_FACTOR, candidate_rates, estimate_rate, interpolate_profile
from distav.noise.rate_fit import GRID

NUM_CLASSES = 4
LARGEST_RATE = (NUM_CLASSES - 1) / NUM_CLASSES
RATES = [LARGEST_RATE * rate for rate in GRID[::2]]


def draw_labels(
    rate: float, mismatch: float, owner: float, num_samples: int = 600, asymmetric: bool = False, seed: int = 0
) -> tuple[Votes, Tensor]:
    """Draw votes that are the class probabilities given Gaussian features, and given labels.

    Args:
        rate: fraction of wrong labels.
        mismatch: fraction of pairs with independent classes.
        owner: fraction of the mismatched pairs whose label names the visual class.
        num_samples: number of samples.
        asymmetric: whether wrong labels are the next class.
        seed: seed of all draws.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(probability: float) -> Tensor:
        return torch.rand(num_samples, generator=generator) < probability

    visual = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)
    other = torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator)
    mismatched = drawn(mismatch)
    audio = torch.where(mismatched, other, visual)
    true = torch.where(mismatched & ~drawn(owner), audio, visual)
    offset = torch.randint(1, NUM_CLASSES, (num_samples,), generator=generator)
    wrong = (true + (torch.ones_like(offset) if asymmetric else offset)) % NUM_CLASSES
    given = torch.where(drawn(rate), wrong, true)
    logs = []
    for classes in (visual, audio):
        features = torch.randn(num_samples, NUM_CLASSES, generator=generator)
        features[torch.arange(num_samples), classes] += 2.5
        logs.append((2.5 * features).log_softmax(1))
    everywhere = torch.ones(num_samples, dtype=torch.bool)
    return Votes([logs[0]], [logs[1]], [], everywhere, everywhere), given


def likelihood_of(votes: Votes, given: Tensor) -> CompositeLikelihood:
    return CompositeLikelihood(votes, given, NUM_CLASSES, torch.ones(len(given)))


@functools.cache
def fitted(rate: float, asymmetric_fit: bool = False, asymmetric: bool = False) -> Profile:
    """Return the fit to labels with a mismatch rate of 0.4; labels of mismatched pairs name the visual class."""
    likelihood = likelihood_of(*draw_labels(rate, 0.4, 0.97, asymmetric=asymmetric))
    return fit_profile(likelihood, RATES, not asymmetric_fit, PairAssumption(0.97))


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_maximum_of_the_profile_is_near_the_true_parameters(rate: float):
    profile = fitted(rate)
    best = int(profile.objective.argmax())
    assert len(profile.objective) == len(RATES) and profile.gain > 100
    assert RATES[best] == pytest.approx(rate, abs=0.07)
    assert float(profile.parameters.mismatch[best]) == pytest.approx(0.4, abs=0.08)
    assert float(profile.parameters.visual_owner[best]) == pytest.approx(0.97)
    # The votes are class probabilities: their inverse temperatures are 1.
    assert profile.parameters.votes[best, :2].tolist() == pytest.approx([0, 0], abs=0.5)
    assert float(profile.objective[0]) < float(profile.objective[best]) - 2
    assert float(profile.objective[-1]) < float(profile.objective[best]) - 50


def test_sharper_votes_explain_more_label_noise():
    profile = fitted(0.4)
    assert float(profile.entropy[1]) > float(profile.entropy[4]) > 0


def test_estimated_matrices_gain_no_likelihood_on_symmetric_noise():
    gain = float(fitted(0.4, asymmetric_fit=True).objective.max() - fitted(0.4).objective.max())
    assert gain < 2


def test_estimated_matrices_gain_likelihood_on_asymmetric_noise_and_equal_its_matrix():
    profile = fitted(0.35, asymmetric_fit=True, asymmetric=True)
    assert float(profile.objective.max() - fitted(0.35, asymmetric=True).objective.max()) > 40
    matrices = profile.parameters.noise.matrices
    assert matrices is not None
    torch.testing.assert_close(matrices.sum(-1), torch.ones(len(RATES), 2, NUM_CLASSES))
    near = min(range(len(RATES)), key=lambda index: abs(RATES[index] - 0.35))
    identity = torch.eye(NUM_CLASSES)
    expected = 0.65 * identity + 0.35 * identity.roll(1, 1)
    torch.testing.assert_close(matrices[near].mean(0), expected, rtol=0, atol=0.12)
    # The folds estimate different matrices with the rate of the grid.
    assert not torch.equal(matrices[near, 0], matrices[near, 1])
    wrong = 1 - matrices.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(wrong.mean((1, 2)), torch.tensor(RATES), rtol=0, atol=0.05)


def test_votes_without_information_gain_no_likelihood():
    votes, given = draw_labels(0.3, 0.0, 0.5, num_samples=400)
    given = given[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    for symmetric in (True, False):
        assert fit_profile(likelihood_of(votes, given), RATES, symmetric, PairAssumption(0.5)).gain < 10


def test_profile_does_not_depend_on_the_parts_that_are_fitted_together(monkeypatch: pytest.MonkeyPatch):
    votes, given = draw_labels(0.3, 0.2, 0.5, num_samples=200)
    likelihood, profiles = likelihood_of(votes, given), []
    for num_rates in (100, 4):
        monkeypatch.setattr(model_fit, "MAX_ELEMENTS", num_rates * 200 * NUM_CLASSES)
        profiles.append(fit_profile(likelihood, RATES[::2], symmetric=False, pairs=PairAssumption(0.5)))
    torch.testing.assert_close(profiles[1].objective, profiles[0].objective, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(profiles[1].parameters.mismatch, profiles[0].parameters.mismatch, rtol=0, atol=1e-2)


@pytest.mark.parametrize("mismatch", [0.1, 0.5])
def test_maximum_of_the_pair_profile_is_near_the_true_mismatch_rate(mismatch: float):
    likelihood = likelihood_of(*draw_labels(0.3, mismatch, 0.97))
    profile = fit_profile(likelihood, RATES[::2], symmetric=True, pairs=PairAssumption(0.97))
    best = profile.parameters.select(profile.objective.argmax()[None])
    parameters, objective = fit_pair_profile(likelihood, best, MISMATCH_GRID, temperature=4.0)
    assert parameters.mismatch.squeeze(1).tolist() == pytest.approx(MISMATCH_GRID)
    assert MISMATCH_GRID[int(objective.argmax())] == pytest.approx(mismatch, abs=0.08)


@pytest.mark.parametrize("owner", VISUAL_OWNERS)
def test_the_true_owner_of_the_labels_explains_them_best(owner: float):
    likelihood = likelihood_of(*draw_labels(0.3, 0.5, owner))
    gains = {
        candidate: fit_profile(likelihood, RATES[::2], symmetric=True, pairs=PairAssumption(candidate)).gain
        for candidate in VISUAL_OWNERS
    }
    assert max(gains, key=gains.__getitem__) == owner, gains


def test_a_known_mismatch_rate_is_not_changed():
    likelihood = likelihood_of(*draw_labels(0.3, 0.5, 0.97))
    profile = fit_profile(likelihood, RATES[::4], symmetric=True, pairs=PairAssumption(0.97, 0.2))
    assert profile.parameters.mismatch.squeeze(1).tolist() == pytest.approx([0.2] * len(RATES[::4]))


def test_joined_parameters_are_selected_again():
    parameters = fitted(0.35, asymmetric_fit=True, asymmetric=True).parameters
    parts = [parameters.select(torch.arange(start, start + 3)) for start in (0, 3, 6)]
    joined = join_parameters(parts)
    for name in ("votes", "mismatch", "visual_owner", "frequencies"):
        assert torch.equal(getattr(joined, name), getattr(parameters, name))
    assert joined.noise.matrices is not None and parameters.noise.matrices is not None
    assert torch.equal(joined.noise.matrices, parameters.noise.matrices)
    assert torch.equal(joined.noise.rates, parameters.noise.rates)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_interval_of_the_fitted_model_covers_both_rates(asymmetric: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rate_fit, "GRID", GRID[::2])
    votes, given = draw_labels(0.3, 0.4, 0.97, asymmetric=asymmetric)
    model = fit_label_model(votes, given, NUM_CLASSES, torch.ones(600), PairAssumption(0.97))
    assert model.label_rate.ci95_low <= 0.3 <= model.label_rate.ci95_high
    assert model.label_rate.estimate == pytest.approx(0.3, abs=0.06)
    assert model.label_rate.ci95_width < 0.25 * CONFORMAL_FACTOR
    # A quarter of the mismatched pairs have equal classes.
    assert model.pair_rate.ci95_low <= 0.3 <= model.pair_rate.ci95_high
    assert model.pair_rate.estimate == pytest.approx(0.3, abs=0.06)
    assert model.pairs.visual_owner == pytest.approx(0.97)
    assert model.pairs.mismatch == pytest.approx(0.4, abs=0.08)
    assert sum(float(weights.sum()) for weights in model.weights) == pytest.approx(1)
    assert model.rate_log_likelihood.shape == candidate_rates(NUM_CLASSES).shape
    assert float(model.rate_log_likelihood.max()) == 0
    is_asymmetric = [parameters.noise.matrices is not None for parameters in model.parameters]
    by_kind = dict(zip(is_asymmetric, (float(weights.sum()) for weights in model.weights), strict=True))
    assert by_kind[asymmetric] > 0.7


def test_priors_of_an_earlier_correction_change_both_rates():
    votes, given = draw_labels(0.3, 0.0, 0.5, num_samples=300)
    positions = candidate_rates(NUM_CLASSES)
    prior = -0.5 * ((positions - 0.3) / 0.02) ** 2
    alone, informed = (
        fit_label_model(
            votes, given, NUM_CLASSES, torch.ones(300), PairAssumption(0.5), rate_priors, is_preliminary=True
        )
        for rate_priors in (None, (prior, prior))
    )
    assert informed.label_rate.ci95_width < alone.label_rate.ci95_width
    assert informed.pair_rate.estimate > alone.pair_rate.estimate + 0.1
    assert informed.label_rate.ci95_low <= 0.3 <= informed.label_rate.ci95_high


def test_grids_are_increasing_rates_relative_to_random_labels():
    for grid in (GRID, MISMATCH_GRID):
        assert list(grid) == sorted(set(grid)) and grid[0] > 0 and grid[-1] < 1
    # The grid is finer than the narrowest intervals that fits to thousands of samples have.
    assert max(second - first for first, second in zip(GRID, GRID[1:], strict=False)) <= 0.061


def test_interpolated_profiles_equal_the_fits_on_the_grid_and_are_constant_outside():
    rates = [LARGEST_RATE * rate for rate in GRID]
    positions = candidate_rates(NUM_CLASSES)
    curve = -200 * (torch.tensor(rates, dtype=torch.float64) - 0.3) ** 2
    at_grid = interpolate_profile(rates, curve, torch.tensor(rates, dtype=torch.float64))
    torch.testing.assert_close(at_grid, curve)
    interpolated = interpolate_profile(rates, curve, positions)
    assert float(interpolated[0]) == pytest.approx(float(curve[0]))
    assert float(interpolated[-1]) == pytest.approx(float(curve[-1]))
    inside = (positions > rates[0]) & (positions < rates[-1])
    torch.testing.assert_close(interpolated[inside], -200 * (positions[inside] - 0.3) ** 2, rtol=0, atol=0.2)
    estimate = estimate_rate(interpolated, NUM_CLASSES)
    assert estimate.estimate == pytest.approx(0.3, abs=0.005)
    assert estimate.ci95_low == pytest.approx(0.3 - CONFORMAL_FACTOR * 1.96 * 0.05, abs=0.012)
    assert estimate.ci95_high == pytest.approx(0.3 + CONFORMAL_FACTOR * 1.96 * 0.05, abs=0.012)
