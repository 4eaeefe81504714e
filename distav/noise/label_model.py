"""The fitted model of a label correction: estimates of the rates, and class probabilities of all samples.

Symmetric and asymmetric label noise are both fitted, see `distav.noise.model_fit`; the result is averaged over both and
over the noise rate, weighted by the tempered profile likelihood with the penalties of `distav.noise.rate_fit`. Where
wrong labels concentrate on few classes, the votes are unmixed, see `distav.noise.vote_unmixing`.
Legend: n samples of this rank, C classes, G noise rates of the grid, R candidate rates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, compute_on_main_rank
from distav.noise.class_posterior import Posterior, posterior
from distav.noise.composite_likelihood import CompositeLikelihood
from distav.noise.correction import MODALITY_DTYPE
from distav.noise.model_fit import (
    PairAssumption,
    Profile,
    fit_elements,
    fit_pair_profile,
)
from distav.noise.model_parameters import Parameters, Votes
from distav.noise.noise_rate import (
    AVERAGE_SLOPE,
    INTERVAL_SLOPE,
    RateEstimate,
    candidate_rates,
    estimate_rate,
    interpolate_profile,
    rates_within_prior,
)
from distav.noise.rate_fit import fit_rates, unmix_if_likely
from distav.noise.threads import threads_for
from distav.noise.tiling import tiles
from distav.noise.vote_tables import VoteTables
from distav.noise.vote_unmixing import VoteUnmixing

MISMATCH_GRID = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.36, 0.42, 0.5, 0.6, 0.75, 0.9)
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

    def posterior(self, votes: Votes | VoteTables, labels: Tensor) -> Posterior:
        """Return class probabilities of samples, averaged over the noise rate and the kind of noise.

        They are computed in tiles. Those of the label's owner are float32, those of the modalities `MODALITY_DTYPE`.
        """
        shape, columns = (len(labels), votes.visual[0].shape[1]), {}
        for field in fields(Posterior):
            dtype = MODALITY_DTYPE if field.name.startswith(("visual", "audio")) else torch.float32
            size = shape[:1] if field.name == "correspondence" else shape
            columns[field.name] = torch.empty(size, dtype=dtype, device=labels.device)
        for part, rows in self._iter_posterior(votes, labels):
            for name, column in columns.items():
                column[part] = getattr(rows, name)
        return Posterior(**columns)

    def correspondence(self, votes: Votes | VoteTables, labels: Tensor) -> Tensor:
        """Return the correspondence probabilities of `posterior`, without its tables: [n]."""
        # A result that is allocated beside the tables of a tile would keep glibc from reusing their memory.
        correspondence = torch.empty(len(labels), device=labels.device)
        for part, rows in self._iter_posterior(votes, labels):
            correspondence[part] = rows.correspondence
        return correspondence

    def _iter_posterior(self, votes: Votes | VoteTables, labels: Tensor) -> Iterator[tuple[slice, Posterior]]:
        """Yield the class probabilities of the samples of each tile."""
        num_rates = sum(len(weights) for weights in self.weights)
        for part in tiles(len(labels), votes.visual[0].shape[1] * num_rates, labels.device):
            yield part, self._posterior_of_rows(votes.rows(part), labels[part])

    def _posterior_of_rows(self, votes: Votes, labels: Tensor) -> Posterior:
        device, pair = labels.device, self.pair.to(labels.device)
        if self.unmixing is not None:
            votes = self.unmixing.to(device).apply(votes)
        parts = [
            posterior(parameters.to(device), weights.to(device), pair, votes, labels)
            for parameters, weights in zip(self.parameters, self.weights, strict=True)
        ]
        return sum(parts[1:], parts[0])


def fit_label_model(
    votes: Votes,
    labels: Tensor,
    num_classes: int,
    weights: Tensor,
    pairs: PairAssumption,
    rate_priors: tuple[Tensor, Tensor] | None = None,
    is_preliminary: bool = False,
) -> LabelModel:
    """Fit the model to the labels of the samples that `select_fit_rows` selects, on the main rank.

    All ranks return its result.

    Args:
        votes: votes of n samples of this rank.
        labels: [n] int64 given labels.
        num_classes: C.
        weights: [n] weights of the samples.
        pairs: assumption on the pairs while the labels are fitted; the mismatch rate is estimated afterwards.
        rate_priors: [R] log-probability of the label-noise rates and of the mismatch rates from an earlier correction.
        is_preliminary: whether to fit symmetric noise only, on a coarse grid.
    """
    sample = _gather_sample(votes, labels, weights)
    return compute_on_main_rank(lambda: _fit(_likelihood(sample, num_classes), pairs, rate_priors, is_preliminary))


def _fit(
    likelihood: CompositeLikelihood,
    pairs: PairAssumption,
    rate_priors: tuple[Tensor, Tensor] | None,
    is_preliminary: bool,
) -> LabelModel:
    """Fit the model; see `fit_label_model`."""
    num_classes = likelihood.num_classes
    rate_prior, pair_prior = rate_priors or (None, None)
    fit, unmixing = fit_rates(likelihood, pairs, is_preliminary, rate_prior), None
    if not is_preliminary:
        likelihood, fit, unmixing = unmix_if_likely(likelihood, fit, pairs)
    temperature, average_temperature = fit.temperature(INTERVAL_SLOPE), fit.temperature(AVERAGE_SLOPE)
    positions = candidate_rates(num_classes)
    prior = torch.zeros(len(fit.grid), dtype=torch.float64)
    if rate_prior is not None:
        prior = interpolate_profile(positions.tolist(), rate_prior.cpu(), torch.tensor(fit.grid))
    log_likelihood = torch.stack(
        [interpolate_profile(fit.grid, curve / temperature + prior, positions) for curve in fit.curves]
    ).logsumexp(0)
    log_likelihood -= log_likelihood.max()
    all_weights = torch.cat([curve / average_temperature + prior for curve in fit.curves]).softmax(0).float()
    kept = _likely_parameters(fit.profiles, all_weights.chunk(len(fit.profiles)))
    total = sum(float(part.sum()) for _, part in kept)
    best_parameters, best_weights = max(kept, key=lambda item: float(item[1].max()))
    best = best_parameters.select(best_weights.argmax()[None]).to(likelihood.labels.device)
    pair, pair_log_likelihood = _fit_pairs(likelihood, best, temperature, pair_prior)
    return LabelModel(
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


def gain_and_temperature(
    votes: Votes, labels: Tensor, num_classes: int, weights: Tensor, pairs: PairAssumption
) -> tuple[float, float]:
    """Return the gain in the composite log-likelihood over the class frequencies, in nats, and its temperature.

    A preliminary fit with the arguments of `fit_label_model`, on the main rank; all ranks return its result.
    """
    sample = _gather_sample(votes, labels, weights)

    def fit() -> tuple[float, float]:
        result = fit_rates(_likelihood(sample, num_classes), pairs, is_preliminary=True)
        return result.gain, result.temperature(AVERAGE_SLOPE)

    return compute_on_main_rank(fit)


def _gather_sample(votes: Votes, labels: Tensor, weights: Tensor) -> tuple[Votes, Tensor, Tensor]:
    """Return votes, labels, and weights of mean 1 of the samples of all ranks."""
    weights = _gather(weights)
    return votes.map(_gather), _gather(labels), weights / weights.mean()


def _likelihood(sample: tuple[Votes, Tensor, Tensor], num_classes: int) -> CompositeLikelihood:
    votes, labels, weights = sample
    return CompositeLikelihood(votes, labels, num_classes, weights)


def _likely_parameters(profiles: Sequence[Profile], weights: Sequence[Tensor]) -> list[tuple[Parameters, Tensor]]:
    """Return the parameters and weights of the rates whose weight is not negligible, by kind of noise, on the CPU."""
    return [
        (profile.parameters.to(torch.device("cpu")).select(rows), part[rows])
        for profile, part in zip(profiles, weights, strict=True)
        if len(rows := (part > NEGLIGIBLE_WEIGHT).nonzero().squeeze(1))
    ]


def _fit_pairs(
    likelihood: CompositeLikelihood, parameters: Parameters, temperature: float, prior: Tensor | None
) -> tuple[Parameters, Tensor]:
    """Return the parameters at the most likely mismatch rate, and the log-likelihood of the mismatch rates.

    The mismatch rate is that of independent pairs; `candidate_rates(C)` are the rates of different classes that follow
    from it in balanced data. The joint votes are left out, because they say nothing on the class of a modality alone.
    """
    likelihood, parameters = likelihood.without_joint_votes(), _without_joint_votes(parameters, likelihood)
    rates = candidate_rates(likelihood.num_classes)
    positions = rates / rates[-1]
    grid = rates_within_prior(MISMATCH_GRID, positions, prior)
    with threads_for(fit_elements(len(likelihood.labels), likelihood.num_classes, len(grid))):
        parameters, objective = fit_pair_profile(likelihood, parameters, grid, temperature)
    curve = objective.cpu() / temperature
    if prior is not None:
        curve = curve + interpolate_profile(positions.tolist(), prior.cpu(), torch.tensor(grid))
    log_likelihood = interpolate_profile(grid, curve, positions)
    return parameters.select(curve.argmax()[None]), log_likelihood - log_likelihood.max()


def _without_joint_votes(parameters: Parameters, likelihood: CompositeLikelihood) -> Parameters:
    """Return the parameters of the model without joint votes; the product starts with the votes of the modalities."""
    single = parameters.votes[:, : len(likelihood.votes.visual) + len(likelihood.votes.audio)]
    return parameters.with_votes(torch.cat([single, single, parameters.votes[:, -3:]], dim=1))


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
