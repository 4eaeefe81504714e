"""Fit of the model of `distav.noise.vote_model` to the given labels, at each noise rate of a grid.

The noise rate e and the sharpness of the votes are nearly confounded: diffuse votes with few wrong labels explain the
given labels about as well as sharp votes with many. The other parameters are therefore fitted at each e, and the
maxima form the profile likelihood of e.
Legend: n samples, C classes, G noise rates, S parameters of the votes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.composite_likelihood import CompositeLikelihood, Evidence
from distav.noise.model_parameters import LabelNoise, Parameters, at_rates, join_parameters, with_rows
from distav.noise.noise_rate import INTERVAL_SLOPE, NEGLIGIBLE_DIFFERENCE, profile_temperature

STEPS, STEP_SIZE = 10, 0.2
"""Steps of Adam between two updates by expectation-maximization, and the first step size."""
START_ROUNDS, ROUNDS, LAST_ROUNDS, PAIR_ROUNDS = 2, 2, 2, 2
"""Rounds of such steps from each start, twice from the best candidates, and twice for each mismatch rate."""
STARTS = (0.0, 0.5)
"""Shifts of the logarithms of the inverse temperatures at the starts of a fit."""
SHARP_STARTS = (1.0, 2.0)
"""Shifts at additional starts under asymmetric noise, from a T that is counted against the predictions of the votes:
otherwise votes that are split between two classes are a local maximum."""
START_MISMATCH = 0.2
START_STRIDE = 3
"""Every third noise rate is fitted from all starts; the results are candidates at all rates."""
LAST_GAIN = 0.03
"""Fraction of the gain over the class frequencies that the rounds after the starts add at most."""
MAX_ELEMENTS = 2**22
"""Elements of a table [G, C, n] of a fit; noise rates are fitted in parts."""
MAX_FIT_SAMPLES, MIN_FIT_SAMPLES, MAX_FIT_ELEMENTS = 3000, 1200, 300_000
"""Largest and smallest number of samples of a fit, and the table size n C between them."""


def fit_elements(num_samples: int, num_classes: int, num_rates: int) -> int:
    """Return the number of elements of the largest table of a fit at several rates."""
    return min(num_samples * num_classes * num_rates, MAX_ELEMENTS)


@dataclass(frozen=True)
class PairAssumption:
    """What is assumed of the pairs in a fit.

    The owner of the labels of mismatched pairs is not estimated: a label that follows the more informative modality
    would be taken for evidence that this modality owns it.

    Attributes:
        visual_owner: w.
        mismatch: m; None if it is estimated.
    """

    visual_owner: float
    mismatch: float | None = None


@dataclass(frozen=True)
class Profile:
    """Fit at each noise rate.

    Attributes:
        parameters: parameters at G noise rates.
        objective: [G] composite log-likelihood with the priors.
        entropy: [G] summed entropy of the class probabilities of the label's owner without the label, in nats.
        baseline: composite log-likelihood of the class frequencies alone.
    """

    parameters: Parameters
    objective: Tensor
    entropy: Tensor
    baseline: float

    @property
    def gain(self) -> float:
        """Gain of the best fit over the class frequencies, in nats."""
        return float(self.objective.max()) - self.baseline

    def with_rows(self, rows: Tensor, others: "Profile") -> "Profile":
        """Return the profile with other fits at the rates with the given numbers."""
        return Profile(
            with_rows(self.parameters, rows, others.parameters),
            self.objective.index_copy(0, rows, others.objective),
            self.entropy.index_copy(0, rows, others.entropy),
            self.baseline,
        )


def fit_profile(
    likelihood: CompositeLikelihood,
    rates: Sequence[float],
    symmetric: bool,
    pairs: PairAssumption,
    entropy_penalty: float = 0.0,
) -> Profile:
    """Fit the model at each noise rate.

    Args:
        likelihood: likelihood of the labels.
        rates: G increasing noise rates.
        symmetric: whether all wrong labels are equally likely; otherwise T is estimated.
        pairs: w, and m if it is known.
        entropy_penalty: largest weight of the entropy by which the rates are compared. The last rounds leave out rates
            that are negligible with any weight up to it.
    """
    start = fit_starts(likelihood, rates, symmetric, pairs)
    return continue_fit(likelihood, rates, start, pairs, entropy_penalty)


@dataclass(frozen=True)
class Start:
    """Fits at some of the noise rates, from several starts.

    Attributes:
        parameters: the best parameters at each of these rates.
        largest_expected: what the largest objective of all may become in the later rounds.
    """

    parameters: Parameters
    largest_expected: float


def fit_starts(
    likelihood: CompositeLikelihood, rates: Sequence[float], symmetric: bool, pairs: PairAssumption
) -> Start:
    """Fit the model at every third noise rate from all starts; see `fit_profile`."""
    device = likelihood.labels.device
    grid = torch.tensor(rates, device=device)
    coarse = grid[START_STRIDE // 2 :: START_STRIDE] if len(rates) > START_STRIDE else grid
    fits_mismatch = pairs.mismatch is None
    starts = [_start(likelihood, coarse, shift, symmetric, pairs) for shift in STARTS]
    if not symmetric:
        starts += [
            likelihood.count_matrices(_start(likelihood, coarse, shift, symmetric, pairs)) for shift in SHARP_STARTS
        ]
    fitted = [_ascend(likelihood, likelihood.objective, start, START_ROUNDS, fits_mismatch) for start in starts]
    objectives = torch.stack([objective for _, objective in fitted])
    best = objectives.argmax(0) * len(coarse) + torch.arange(len(coarse), device=device)
    largest = float(objectives.max())
    return Start(
        join_parameters([parameters for parameters, _ in fitted]).select(best),
        largest + LAST_GAIN * (largest - likelihood.baseline),
    )


def continue_fit(
    likelihood: CompositeLikelihood,
    rates: Sequence[float],
    start: Start,
    pairs: PairAssumption,
    entropy_penalty: float = 0.0,
) -> Profile:
    """Fit the model at all noise rates, with the results of `fit_starts` as candidates; see `fit_profile`."""
    grid = torch.tensor(rates, device=likelihood.labels.device)

    def fit(candidates: Parameters, rows: Tensor, num_rounds: int) -> Profile:
        candidates = _best_candidates(likelihood, candidates, grid[rows])
        fitted, objective = _ascend(likelihood, likelihood.objective, candidates, num_rounds, pairs.mismatch is None)
        with torch.no_grad():
            parts = [likelihood.entropy(fitted.select(part)) for part in _parts(likelihood, len(rows))]
        return Profile(fitted, objective, torch.cat(parts), likelihood.baseline)

    profile = fit(start.parameters, torch.arange(len(rates), device=grid.device), ROUNDS)
    rows = _likely_rows(likelihood, profile, entropy_penalty)
    return profile.with_rows(rows, fit(profile.parameters, rows, LAST_ROUNDS))


def _likely_rows(likelihood: CompositeLikelihood, profile: Profile, entropy_penalty: float) -> Tensor:
    """Return the numbers of the rates that are not negligible, with or without the penalty."""
    likely = torch.zeros_like(profile.objective, dtype=torch.bool)
    for weight in (0.0, entropy_penalty):
        curve = profile.objective - weight * profile.entropy
        entropy = profile.entropy[curve.argmax()] / (len(likelihood.labels) * math.log(likelihood.num_classes))
        likely |= curve > curve.max() - NEGLIGIBLE_DIFFERENCE * profile_temperature(float(entropy), INTERVAL_SLOPE)
    return likely.nonzero().squeeze(1)


def fit_pair_profile(
    likelihood: CompositeLikelihood, parameters: Parameters, mismatches: Sequence[float], temperature: float
) -> tuple[Parameters, Tensor]:
    """Fit the model at each mismatch rate and one noise rate; the agreement of the modalities is evidence here.

    Args:
        likelihood: likelihood of the labels.
        parameters: parameters at one noise rate, the start of the fit.
        mismatches: mismatch rates m.
        temperature: of the log-likelihood. The last rounds leave out negligible rates.

    Returns:
        The parameters at each m, and the log-likelihood [len(mismatches)].
    """
    rates = torch.tensor(mismatches, device=likelihood.labels.device)[:, None]
    parameters = replace(parameters.select(torch.zeros(len(rates), dtype=torch.long)), mismatch=rates)
    parameters, objective = _ascend(likelihood, likelihood.pair_objective, parameters, PAIR_ROUNDS, False)
    rows = (objective > objective.max() - NEGLIGIBLE_DIFFERENCE * temperature).nonzero().squeeze(1)
    last = _ascend(likelihood, likelihood.pair_objective, parameters.select(rows), PAIR_ROUNDS, False)
    return with_rows(parameters, rows, last[0]), objective.index_copy(0, rows, last[1])


def _best_candidates(likelihood: CompositeLikelihood, candidates: Parameters, rates: Tensor) -> Parameters:
    """Return the best of the candidates at each noise rate: the start of an ascent."""
    num_candidates = len(candidates.votes)
    index = torch.arange(num_candidates, device=rates.device).repeat_interleave(len(rates))
    all_rates = rates.repeat(num_candidates)
    objectives: list[Tensor] = []
    with torch.no_grad():
        for rows in _parts(likelihood, len(index)):
            part = at_rates(candidates, index[rows], all_rates[rows])
            objectives.append(likelihood.objective(part, likelihood.evidence(part)))
    best = torch.cat(objectives).view(num_candidates, len(rates)).argmax(0)
    return at_rates(candidates, best, rates)


Objective = Callable[[Parameters, Evidence], Tensor]


def _ascend(
    likelihood: CompositeLikelihood,
    objective: Objective,
    parameters: Parameters,
    num_rounds: int,
    fits_mismatch: bool,
) -> tuple[Parameters, Tensor]:
    """Maximize an objective by Adam and expectation-maximization in turn; return the parameters and maxima [G]."""
    fitted: list[Parameters] = []
    maxima: list[Tensor] = []
    for rows in _parts(likelihood, len(parameters.votes)):
        part = parameters.select(rows)
        variables = part.votes.clone().requires_grad_()
        optimizer = torch.optim.Adam([variables], lr=STEP_SIZE, betas=(0.8, 0.95))
        evidence = likelihood.evidence(part)
        for round_index in range(num_rounds):
            optimizer.param_groups[0]["lr"] = STEP_SIZE * (1 - round_index / num_rounds) ** 0.7
            for _ in range(STEPS):
                optimizer.zero_grad()
                loss = -objective(part.with_votes(variables), evidence).sum() / len(likelihood.labels)
                loss.backward()
                optimizer.step()
            part = part.with_votes(variables.detach())
            if round_index + 1 < num_rounds:
                part = likelihood.maximize(part, fits_mismatch)
                evidence = likelihood.evidence(part)
        fitted.append(part)
        with torch.no_grad():
            maxima.append(objective(part, evidence))
    return join_parameters(fitted), torch.cat(maxima)


def _parts(likelihood: CompositeLikelihood, count: int) -> list[Tensor]:
    """Return the numbers of the noise rates in parts whose tables are small enough; see `MAX_ELEMENTS`."""
    size = max(1, MAX_ELEMENTS // (len(likelihood.labels) * likelihood.num_classes))
    return list(torch.arange(count, device=likelihood.labels.device).split(size))


def _start(
    likelihood: CompositeLikelihood, rates: Tensor, shift: float, symmetric: bool, pairs: PairAssumption
) -> Parameters:
    """Return the parameters at the start of a fit; see `STARTS`."""
    votes = likelihood.prior_mean.repeat(len(rates), 1)
    votes[:, :-3] += shift
    return Parameters(
        votes,
        torch.full_like(votes[:, :1], START_MISMATCH if pairs.mismatch is None else pairs.mismatch),
        torch.full_like(votes[:, :1], pairs.visual_owner),
        likelihood.frequencies.expand(len(rates), -1),
        LabelNoise(rates, None if symmetric else _symmetric_matrices(rates, likelihood.num_classes)),
        torch.ones_like(votes[:, :2]),
    )


def _symmetric_matrices(rates: Tensor, num_classes: int) -> Tensor:
    """Return T of symmetric noise for both folds: [G] -> [G, 2, C, C]."""
    identity = torch.eye(num_classes, device=rates.device)
    uniform = (1 - identity) / (num_classes - 1)
    matrix = (1 - rates)[:, None, None] * identity + rates[:, None, None] * uniform
    return matrix[:, None].expand(-1, 2, -1, -1)


def select_fit_rows(present: Tensor, num_classes: int) -> Tensor:
    """Return the row numbers of this rank's samples that a model is fitted to: a random subset of a large dataset.

    Args:
        present: [n] bool, samples with votes.
        num_classes: C.
    """
    rows = present.nonzero().squeeze(1)
    total = int(all_reduce_sum_(torch.tensor(float(len(rows)), dtype=torch.float64, device=present.device)))
    limit = min(MAX_FIT_SAMPLES, max(MIN_FIT_SAMPLES, MAX_FIT_ELEMENTS // num_classes))
    kept = min(len(rows), round(len(rows) * limit / max(total, 1)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).to(present.device)
    return rows[order[:kept].sort().values]
