"""Fits at the noise rates of a grid, of symmetric and asymmetric noise, and their penalties.

Diffuse votes with few wrong labels and sharp votes with many are confounded, under asymmetric noise almost completely.
Because a sample has one class, the entropy of the class probabilities is a penalty, as in the minimum-entropy
regularization of Grandvalet and Bengio (2004).
Legend: n samples, C classes, G noise rates of the grid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distav.noise.composite_likelihood import CompositeLikelihood
from distav.noise.model_fit import PairAssumption, Profile, continue_fit, fit_elements, fit_profile, fit_starts
from distav.noise.noise_rate import candidate_rates, profile_temperature, rates_within_prior
from distav.noise.threads import call_concurrently, threads_for
from distav.noise.vote_unmixing import VoteUnmixing

GRID = (0.002, 0.03, 0.08, 0.13, 0.18, 0.235, 0.29, 0.345, 0.4, 0.46, 0.52, 0.58, 0.64, 0.7, 0.76, 0.82, 0.88, 0.94)
"""Noise rates of the fits, relative to that of random labels."""
COARSE_GRID = GRID[::3]
SYMMETRIC_ENTROPY_PENALTY, ASYMMETRIC_ENTROPY_PENALTY = 0.02, 0.1
"""Weights of the entropy under symmetric and asymmetric noise."""
ENTROPY_PENALTY_PER_GAIN = 0.25
"""Largest weight of the entropy for a mean gain of one nat per label: it does not outweigh what the labels say."""
ASYMMETRY_PENALTY_PER_CLASS, ASYMMETRY_PENALTY_PER_ENTRY = 2.0, 0.25
"""Log-likelihood in nats that asymmetric noise must gain to be as probable as symmetric noise, for each class and for
each free entry of the transition matrix; the smaller sum counts. The folds are not fully independent, because samples
vote for each other."""
MAX_ENTROPY_BONUS = 3.0
"""Asymmetric noise that explains the labels with less entropy gains up to this multiple of its penalty."""


@dataclass(frozen=True)
class RateFit:
    """Fits at the noise rates of a grid.

    Attributes:
        grid: G noise rates.
        profiles: profile of each kind of noise.
        curves: its penalized log-likelihood [G].
        entropy: mean relative entropy of the class probabilities under the better kind.
        gain: composite log-likelihood that it gains over the class frequencies, in nats.
    """

    grid: Sequence[float]
    profiles: Sequence[Profile]
    curves: Sequence[Tensor]
    entropy: float
    gain: float

    def temperature(self, slope: float) -> float:
        """Return the temperature of the log-likelihood; see `distav.noise.noise_rate.profile_temperature`."""
        return profile_temperature(self.entropy, slope)


def fit_rates(
    likelihood: CompositeLikelihood, pairs: PairAssumption, is_preliminary: bool, prior: Tensor | None = None
) -> RateFit:
    """Fit the model at the noise rates of the grid.

    Args:
        likelihood: likelihood of the labels.
        pairs: assumption on the pairs.
        is_preliminary: whether to fit symmetric noise only, on a coarse grid.
        prior: [R] log-probability of the candidate rates from an earlier correction; rates that it excludes are left
            out.
    """
    num_classes = likelihood.num_classes
    positions = candidate_rates(num_classes)
    grid = [float(positions[-1]) * rate for rate in (COARSE_GRID if is_preliminary else GRID)]
    grid = rates_within_prior(grid, positions, prior)
    elements = fit_elements(len(likelihood.labels), num_classes, len(grid))

    def fit(symmetric: bool, entropy_penalty: float) -> Profile:
        with threads_for(elements):
            return fit_profile(likelihood, grid, symmetric, pairs, entropy_penalty)

    fits = [partial(fit, True, SYMMETRIC_ENTROPY_PENALTY)]
    if not is_preliminary:
        fits.append(partial(fit, False, ASYMMETRIC_ENTROPY_PENALTY))
    profiles = call_concurrently(fits, likelihood.labels.device, elements)
    gain = max(profile.gain - kind * _asymmetry_penalty(num_classes) for kind, profile in enumerate(profiles))
    return RateFit(grid, profiles, *_penalized_curves(likelihood, profiles, gain), gain)


def unmix_if_likely(
    likelihood: CompositeLikelihood, fit: RateFit, pairs: PairAssumption
) -> tuple[CompositeLikelihood, RateFit, VoteUnmixing | None]:
    """Return likelihood and fit of unmixed votes if asymmetric noise explains the labels better with them.

    They are compared as symmetric and asymmetric noise are: unmixed votes have the penalty of asymmetric noise, and a
    bonus for less entropy.
    """
    num_samples, num_classes = len(likelihood.labels), likelihood.num_classes
    unmixing = VoteUnmixing.fit(likelihood.votes)
    if not unmixing.names_classes:
        return likelihood, fit, None
    unmixed = CompositeLikelihood(unmixing.apply(likelihood.votes), likelihood.labels, num_classes, likelihood.weights)
    penalty, needed = _asymmetry_penalty(num_classes), max(float(curve.max()) for curve in fit.curves)
    with threads_for(fit_elements(num_samples, num_classes, len(fit.grid))):
        start = fit_starts(unmixed, fit.grid, False, pairs)
        if start.largest_expected - penalty + MAX_ENTROPY_BONUS * penalty <= needed:
            return likelihood, fit, None
        profile = continue_fit(unmixed, fit.grid, start, pairs, ASYMMETRIC_ENTROPY_PENALTY)
    gain = profile.gain - penalty
    entropy_penalty = min(ASYMMETRIC_ENTROPY_PENALTY, ENTROPY_PENALTY_PER_GAIN * max(gain, 0.0) / num_samples)
    curve = _penalized(profile, entropy_penalty)
    largest_entropy = num_samples * math.log(num_classes)
    entropy = float(profile.entropy[curve.argmax()]) / largest_entropy
    curve = curve - penalty + _entropy_bonus(entropy_penalty * largest_entropy * (fit.entropy - entropy), penalty)
    if float(curve.max()) <= needed:
        return likelihood, fit, None
    return unmixed, RateFit(fit.grid, [profile], [curve], entropy, gain), unmixing.to(torch.device("cpu"))


def _asymmetry_penalty(num_classes: int) -> float:
    """Return the log-likelihood that asymmetric noise must gain, in nats; see `ASYMMETRY_PENALTY_PER_CLASS`."""
    entries = num_classes * (num_classes - 1)
    return min(ASYMMETRY_PENALTY_PER_CLASS * num_classes, ASYMMETRY_PENALTY_PER_ENTRY * entries)


def _penalized_curves(
    likelihood: CompositeLikelihood, profiles: Sequence[Profile], gain: float
) -> tuple[list[Tensor], float]:
    """Return the penalized profile of each kind of noise [G] on the CPU, and the mean entropy of the better one.

    Args:
        likelihood: likelihood of the labels.
        profiles: profile of symmetric noise and, unless the fit is preliminary, of asymmetric noise.
        gain: gain over the class frequencies, in nats.
    """
    num_samples, num_classes = len(likelihood.labels), likelihood.num_classes
    largest_penalty = ENTROPY_PENALTY_PER_GAIN * max(gain, 0.0) / num_samples
    penalties = [min(penalty, largest_penalty) for penalty in (SYMMETRIC_ENTROPY_PENALTY, ASYMMETRIC_ENTROPY_PENALTY)]
    curves = [_penalized(*pair) for pair in zip(profiles, penalties, strict=False)]
    entropies = [float(profile.entropy[curve.argmax()]) for profile, curve in zip(profiles, curves, strict=True)]
    if len(profiles) > 1:
        penalty = _asymmetry_penalty(num_classes)
        curves[1] = curves[1] - penalty + _entropy_bonus(penalties[1] * (entropies[0] - entropies[1]), penalty)
    best_kind = max(range(len(curves)), key=lambda kind: float(curves[kind].max()))
    return curves, entropies[best_kind] / (num_samples * math.log(num_classes))


def _entropy_bonus(bonus: float, asymmetry_penalty: float) -> float:
    """Return what asymmetric noise gains for less entropy, in nats; see `MAX_ENTROPY_BONUS`."""
    return min(max(bonus, 0.0), MAX_ENTROPY_BONUS * asymmetry_penalty)


def _penalized(profile: Profile, entropy_penalty: float) -> Tensor:
    """Return the objective minus the penalty of the entropy, on the CPU: [G].

    The penalty compares the rates under one kind of noise; it does not change the maximum, by which symmetric and
    asymmetric noise are compared.
    """
    curve = profile.objective - entropy_penalty * profile.entropy
    return (curve - curve.max() + profile.objective.max()).cpu()
