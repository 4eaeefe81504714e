"""The fitted model of a label correction: estimates of the rates, and class probabilities of all samples.

Symmetric and asymmetric label noise are both fitted, see `distav.noise.model_fit`; the result is averaged over both and
over the noise rate, weighted by the tempered profile likelihood. Diffuse votes with few wrong labels and sharp votes
with many are confounded, under asymmetric noise almost completely. Because a sample has one class, the entropy of the
class probabilities is a penalty, as in the minimum-entropy regularization of Grandvalet and Bengio (2004).
Legend: n samples of this rank, C classes, G noise rates of the grid, R candidate rates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, broadcast
from distav.noise.class_posterior import Posterior, posterior
from distav.noise.composite_likelihood import CompositeLikelihood
from distav.noise.model_fit import (
    MAX_ELEMENTS,
    PairAssumption,
    Profile,
    fit_pair_profile,
    fit_profile,
    without_joint_votes,
)
from distav.noise.model_parameters import Parameters, Votes
from distav.noise.noise_rate import RateEstimate, candidate_rates, estimate_rate, interpolate_profile
from distav.noise.tiling import threads_for, tiles
from distav.noise.vote_unmixing import VoteUnmixing

GRID = (0.002, 0.03, 0.08, 0.13, 0.18, 0.235, 0.29, 0.345, 0.4, 0.46, 0.52, 0.58, 0.64, 0.7, 0.76, 0.82, 0.88, 0.94)
"""Noise rates of the fits, relative to that of random labels."""
COARSE_GRID = GRID[::3]
MISMATCH_GRID = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.36, 0.42, 0.5, 0.6, 0.75, 0.9)
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
TEMPERATURE, INTERVAL_SLOPE, AVERAGE_SLOPE = 4.0, 32.0, 4.0
"""Temperature of a profile if the classes are certain, and its relative increase per square of the mean entropy, which
is 1 for uniform class probabilities, in intervals and in averages over the rates: each label enters the composite
likelihood twice, and the more diffuse the votes are, the more a misfit of the model counts. Labels that are corrected
at the likely rates are more accurate than an average over all rates of a wide interval."""
NEGLIGIBLE_WEIGHT = 0.01
"""Noise rates of less weight are left out of averages."""


@dataclass(frozen=True)
class LabelModel:
    """Result of a fit.

    Attributes:
        parameters: parameters at the noise rates that are averaged over, for symmetric and for asymmetric noise; a kind
            of noise without weight is left out.
        weights: weights of these rates, sum 1 over all.
        pair: parameters without joint votes at the most likely mismatch rate; the mismatch rate is changed as by
            `CompositeLikelihood.match_calibrated`.
        pair_mismatch: most likely mismatch rate.
        rate_log_likelihood: [R] tempered log-likelihood of `candidate_rates(C)`, maximum 0.
        pair_rate_log_likelihood: [R] the same of the mismatch rates.
        label_rate: label-noise rate.
        pair_rate: rate of pairs whose modalities show different classes.
        gain: gain in the log-likelihood of the labels over the class frequencies, in nats.
        unmixing: what turns votes on labels into votes on classes; None if the votes are used as they are.
    """

    parameters: Sequence[Parameters]
    weights: Sequence[Tensor]
    pair: Parameters
    pair_mismatch: float
    rate_log_likelihood: Tensor
    pair_rate_log_likelihood: Tensor
    label_rate: RateEstimate
    pair_rate: RateEstimate
    gain: float
    unmixing: VoteUnmixing | None = None

    @property
    def pairs(self) -> PairAssumption:
        """The estimated mismatch rate and the owner, for another fit."""
        return PairAssumption(float(self.pair.visual_owner), self.pair_mismatch)

    def posterior(self, votes: Votes, labels: Tensor) -> Posterior:
        """Return class probabilities of samples, averaged over the noise rate and the kind of noise, in tiles."""
        num_classes, num_rates = votes.visual[0].shape[1], sum(len(weights) for weights in self.weights)
        table = votes.visual[0].new_empty
        result = Posterior(
            *(
                table((len(labels),) if field.name == "correspondence" else (len(labels), num_classes))
                for field in fields(Posterior)
            )
        )
        for part in tiles(len(labels), num_classes * num_rates, labels.device):
            rows = self._posterior_of_rows(votes.rows(part), labels[part])
            for field in fields(Posterior):
                getattr(result, field.name)[part] = getattr(rows, field.name)
        return result

    def _posterior_of_rows(self, votes: Votes, labels: Tensor) -> Posterior:
        device, pair = labels.device, self.pair.to(labels.device)
        if self.unmixing is not None:
            votes = self.unmixing.to(device).apply(votes)
        parts = [
            posterior(parameters.to(device), weights.to(device), pair, votes, labels)
            for parameters, weights in zip(self.parameters, self.weights, strict=True)
        ]
        return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class _RateFit:
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
        """Return the temperature of the log-likelihood; see `TEMPERATURE`."""
        return TEMPERATURE * (1 + slope * self.entropy**2)


def fit_label_model(
    votes: Votes,
    labels: Tensor,
    num_classes: int,
    weights: Tensor,
    pairs: PairAssumption,
    rate_priors: tuple[Tensor, Tensor] | None = None,
    is_preliminary: bool = False,
) -> LabelModel:
    """Fit the model to the labels of the samples that `select_fit_rows` selects; all ranks return the same result.

    Args:
        votes: votes of n samples of this rank.
        labels: [n] int64 given labels.
        num_classes: C.
        weights: [n] weights of the samples.
        pairs: assumption on the pairs while the labels are fitted; the mismatch rate is estimated afterwards.
        rate_priors: [R] log-probability of the label-noise rates and of the mismatch rates from an earlier correction.
        is_preliminary: whether to fit symmetric noise only, on a coarse grid.
    """
    likelihood = _likelihood(votes, labels, num_classes, weights)
    fit, unmixing = _fit_rates(likelihood, pairs, is_preliminary), None
    if not is_preliminary:
        likelihood, fit, unmixing = _unmix_if_likely(likelihood, fit, pairs)
    temperature, average_temperature = fit.temperature(INTERVAL_SLOPE), fit.temperature(AVERAGE_SLOPE)
    positions = candidate_rates(num_classes)
    prior = torch.zeros(len(fit.grid), dtype=torch.float64)
    if rate_priors is not None:
        prior = interpolate_profile(positions.tolist(), rate_priors[0].cpu(), torch.tensor(fit.grid))
    log_likelihood = torch.stack(
        [interpolate_profile(fit.grid, curve / temperature + prior, positions) for curve in fit.curves]
    ).logsumexp(0)
    log_likelihood -= log_likelihood.max()
    all_weights = torch.cat([curve / average_temperature + prior for curve in fit.curves]).softmax(0).float()
    kept = _likely_parameters(fit.profiles, all_weights.chunk(len(fit.profiles)))
    total = sum(float(part.sum()) for _, part in kept)
    best_parameters, best_weights = max(kept, key=lambda item: float(item[1].max()))
    best = best_parameters.select(best_weights.argmax()[None]).to(labels.device)
    pair, pair_log_likelihood = _fit_pairs(likelihood, best, temperature, rate_priors and rate_priors[1])
    model = LabelModel(
        parameters=[parameters for parameters, _ in kept],
        weights=[part / total for _, part in kept],
        pair=likelihood.match_calibrated(pair).to(torch.device("cpu")),
        pair_mismatch=float(pair.mismatch),
        rate_log_likelihood=log_likelihood,
        pair_rate_log_likelihood=pair_log_likelihood,
        label_rate=estimate_rate(log_likelihood, num_classes),
        pair_rate=_pair_rate(likelihood, pair_log_likelihood),
        gain=fit.gain / 2,
        unmixing=unmixing,
    )
    return broadcast(model)


def gain_and_temperature(
    votes: Votes, labels: Tensor, num_classes: int, weights: Tensor, pairs: PairAssumption
) -> tuple[float, float]:
    """Return the gain in the composite log-likelihood over the class frequencies, in nats, and its temperature.

    A preliminary fit with the arguments of `fit_label_model`; all ranks return the same result.
    """
    fit = _fit_rates(_likelihood(votes, labels, num_classes, weights), pairs, is_preliminary=True)
    return broadcast((fit.gain, fit.temperature(AVERAGE_SLOPE)))


def _likelihood(votes: Votes, labels: Tensor, num_classes: int, weights: Tensor) -> CompositeLikelihood:
    """Return the likelihood of the samples of all ranks."""
    weights = _gather(weights)
    return CompositeLikelihood(votes.map(_gather), _gather(labels), num_classes, weights / weights.mean())


def _fit_rates(likelihood: CompositeLikelihood, pairs: PairAssumption, is_preliminary: bool) -> _RateFit:
    num_classes = likelihood.num_classes
    largest_rate = float(candidate_rates(num_classes)[-1])
    grid = [largest_rate * rate for rate in (COARSE_GRID if is_preliminary else GRID)]
    with threads_for(min(len(likelihood.labels) * num_classes * len(grid), MAX_ELEMENTS)):
        profiles = [fit_profile(likelihood, grid, symmetric=True, pairs=pairs)]
        if not is_preliminary:
            profiles.append(fit_profile(likelihood, grid, symmetric=False, pairs=pairs))
    gain = max(profile.gain - kind * _asymmetry_penalty(num_classes) for kind, profile in enumerate(profiles))
    return _RateFit(grid, profiles, *_penalized_curves(likelihood, profiles, gain), gain)


def _unmix_if_likely(
    likelihood: CompositeLikelihood, fit: _RateFit, pairs: PairAssumption
) -> tuple[CompositeLikelihood, _RateFit, VoteUnmixing | None]:
    """Return likelihood and fit of unmixed votes if asymmetric noise explains the labels better with them.

    Nothing but the likelihood decides here, and it has to gain the penalty of asymmetric noise.
    """
    num_samples, num_classes = len(likelihood.labels), likelihood.num_classes
    unmixing = VoteUnmixing.fit(likelihood.votes)
    unmixed = CompositeLikelihood(unmixing.apply(likelihood.votes), likelihood.labels, num_classes, likelihood.weights)
    with threads_for(min(num_samples * num_classes * len(fit.grid), MAX_ELEMENTS)):
        profile = fit_profile(unmixed, fit.grid, symmetric=False, pairs=pairs)
    penalty = _asymmetry_penalty(num_classes)
    gain = profile.gain - penalty
    entropy_penalty = min(ASYMMETRIC_ENTROPY_PENALTY, ENTROPY_PENALTY_PER_GAIN * max(gain, 0.0) / num_samples)
    curve = _penalized(profile, entropy_penalty) - penalty
    if float(curve.max()) <= max(float(other.max()) for other in fit.curves):
        return likelihood, fit, None
    entropy = float(profile.entropy[curve.argmax()]) / (num_samples * math.log(num_classes))
    return unmixed, _RateFit(fit.grid, [profile], [curve], entropy, gain), unmixing.to(torch.device("cpu"))


def _likely_parameters(profiles: Sequence[Profile], weights: Sequence[Tensor]) -> list[tuple[Parameters, Tensor]]:
    """Return the parameters and weights of the rates whose weight is not negligible, by kind of noise, on the CPU."""
    return [
        (profile.parameters.to(torch.device("cpu")).select(rows), part[rows])
        for profile, part in zip(profiles, weights, strict=True)
        if len(rows := (part > NEGLIGIBLE_WEIGHT).nonzero().squeeze(1))
    ]


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
        bonus = penalties[1] * max(entropies[0] - entropies[1], 0.0)
        penalty = _asymmetry_penalty(num_classes)
        curves[1] = curves[1] - penalty + min(bonus, MAX_ENTROPY_BONUS * penalty)
    best_kind = max(range(len(curves)), key=lambda kind: float(curves[kind].max()))
    return curves, entropies[best_kind] / (num_samples * math.log(num_classes))


def _penalized(profile: Profile, entropy_penalty: float) -> Tensor:
    """Return the objective minus the penalty of the entropy, on the CPU: [G].

    The penalty compares the rates under one kind of noise; it does not change the maximum, by which symmetric and
    asymmetric noise are compared.
    """
    curve = profile.objective - entropy_penalty * profile.entropy
    return (curve - curve.max() + profile.objective.max()).cpu()


def _fit_pairs(
    likelihood: CompositeLikelihood, parameters: Parameters, temperature: float, prior: Tensor | None
) -> tuple[Parameters, Tensor]:
    """Return the parameters at the most likely mismatch rate, and the log-likelihood of the mismatch rates.

    The mismatch rate is that of independent pairs; `candidate_rates(C)` are the rates of different classes that follow
    from it in balanced data. The joint votes are left out, because they say nothing on the class of a modality alone.
    """
    likelihood, parameters = likelihood.without_joint_votes(), without_joint_votes(parameters, likelihood)
    with threads_for(min(len(likelihood.labels) * likelihood.num_classes * len(MISMATCH_GRID), MAX_ELEMENTS)):
        parameters, objective = fit_pair_profile(likelihood, parameters, MISMATCH_GRID)
    rates = candidate_rates(likelihood.num_classes)
    curve = objective.cpu() / temperature
    if prior is not None:
        curve = curve + interpolate_profile((rates / rates[-1]).tolist(), prior.cpu(), torch.tensor(MISMATCH_GRID))
    log_likelihood = interpolate_profile(MISMATCH_GRID, curve, rates / rates[-1])
    return parameters.select(curve.argmax()[None]), log_likelihood - log_likelihood.max()


def _pair_rate(likelihood: CompositeLikelihood, log_likelihood: Tensor) -> RateEstimate:
    """Return the rate of pairs with different classes, which is smaller if some classes are frequent."""
    estimate = estimate_rate(log_likelihood, likelihood.num_classes)
    largest_rate = candidate_rates(likelihood.num_classes)[-1]
    ratio = float((1 - likelihood.frequencies.square().sum()) / largest_rate)
    return RateEstimate(ratio * estimate.estimate, ratio * estimate.ci95_low, ratio * estimate.ci95_high)


def _gather(rows: Tensor) -> Tensor:
    """Return the rows of all ranks; bool columns are exchanged as numbers."""
    if rows.dtype == torch.bool:
        return all_gather_variable_rows(rows.float()) > 0
    return all_gather_variable_rows(rows)
