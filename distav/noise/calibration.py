"""Calibration and comparison of held-out votes, from the given labels alone.

A held-out vote does not depend on the sample's own label, so that label is evidence on the vote. With an inverse
temperature b, a vote v becomes the class probabilities p = softmax(b log v). Let labels be wrong at rate e, and let
class c be labeled y != c with probability D(c, y). The given labels y then have the log-likelihood

    log L(e, b) = sum_i log[ (1 - e) p_i(y_i) + e sum_c p_i(c) D(c, y_i) ]

D is uniform, 1 / (C - 1) for all other classes, unless the errors counted against the predicted classes explain the
labels much better.

A vote that carries no information on the class gains no likelihood over the class frequencies, whatever b is; the more
informative of two votes has the larger maximum. The likelihood therefore selects features, neighborhoods and
temperatures, calibrates the selected vote and estimates the noise rate, without true labels.
Legend: N samples, n samples of this rank, t samples of a tile, C classes, R rates, S inverse temperatures, M members of
the ensemble.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_, broadcast
from distav.noise.noise_rate import MATRIX_PRIOR, candidate_rates, uniform_transition_matrix
from distav.noise.probabilities import normalize_likelihood, normalize_rows, row_entropy
from distav.noise.tiling import map_tiles, tiles

MIN_PROBABILITY = 1e-12
"""Lower bound of the probability of a label; a product of sixteen of them is still a normal number."""
INVERSE_TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.5, 7.0)
PSEUDO_COUNT = 20.0
"""Weight of a vote relative to one uniform vote that is added to it, so that no class has probability 0."""
WEIGHT_DIVISIONS = 4
"""Each sum of the ensemble weights is distributed over the members in steps of this fraction."""
WEIGHT_SUMS = (0.5, 1.0, 1.5)
"""Candidate sums of the ensemble weights; the temperature of the combined probabilities is calibrated afterwards."""
MIN_MEMBER_PROBABILITY = 1e-4
"""Lower bound of the class probabilities of a member of the ensemble."""
NEGLIGIBLE_WEIGHT = 1e-12
"""Inverse temperatures of less weight are left out of an average."""
MAX_CALIBRATION_SAMPLES = 20_000
"""Samples on which votes are compared; more samples do not change the selection."""


@dataclass(frozen=True)
class Calibration:
    """Fit of a vote to the given labels.

    Attributes:
        log_likelihood: [R, S] log-likelihood of the given labels, including the prior of the rate.
        error_distribution: [C, C] D, the distribution of the wrong labels of each class; rows sum to 1, the diagonal is
            0.
        is_asymmetric: whether D is class-dependent rather than uniform.
        per_sample: maximum of the log-likelihood divided by the number of samples, in nats.
        entropy: mean entropy of the calibrated probabilities, in nats.
        num_samples: number of samples used.
    """

    log_likelihood: Tensor
    error_distribution: Tensor
    is_asymmetric: bool
    per_sample: float
    entropy: float
    num_samples: int

    @property
    def rate_log_likelihood(self) -> Tensor:
        """Log-likelihood of each rate, marginalized over the inverse temperature: [R], maximum 0."""
        by_rate = self.log_likelihood.logsumexp(1)
        return by_rate - by_rate.max()

    def calibrate(self, votes: Tensor) -> Tensor:
        """Return calibrated class probabilities, averaged over the inverse temperature: [n, C] -> [n, C]."""
        weights = temperature_weights(self.log_likelihood)
        return map_tiles(votes.shape[1], lambda rows: average_over_temperatures(rows, weights), votes)


def temperature_scaled(votes: Tensor, indices: Iterable[int] = range(len(INVERSE_TEMPERATURES))) -> Iterator[Tensor]:
    """Yield softmax(b log v) for each inverse temperature b: [t, C] -> S times [t, C].

    A uniform vote is added first, see `PSEUDO_COUNT`.

    Args:
        votes: [t, C].
        indices: positions in `INVERSE_TEMPERATURES`; default: all.
    """
    logs = ((PSEUDO_COUNT * votes + 1 / votes.shape[1]) / (PSEUDO_COUNT + 1)).log_()
    for index in indices:
        yield (INVERSE_TEMPERATURES[index] * logs).softmax(1)


def average_over_temperatures(votes: Tensor, weights: Mapping[int, float]) -> Tensor:
    """Return the weighted average of the temperature-scaled votes: [t, C] -> [t, C].

    Args:
        votes: [t, C].
        weights: weights by position in `INVERSE_TEMPERATURES`.
    """
    average = torch.zeros_like(votes)
    for weight, probs in zip(weights.values(), temperature_scaled(votes, weights), strict=True):
        average = average + weight * probs
    return average


def temperature_weights(log_likelihood: Tensor) -> dict[int, float]:
    """Return the posterior of the inverse temperatures, marginalized over the rate, without negligible ones.

    Args:
        log_likelihood: [R, S].

    Returns:
        Weights by position in `INVERSE_TEMPERATURES`.
    """
    weights = enumerate(normalize_likelihood(log_likelihood, marginalized_dim=0).tolist())
    return {index: weight for index, weight in weights if weight > NEGLIGIBLE_WEIGHT}


class VoteCalibrator:
    """Calibrates votes on the given labels of all samples, or of a regular subset of a large dataset.

    Each rank processes its own samples in tiles; the sums are reduced over all ranks.
    """

    def __init__(self, labels: Tensor, num_classes: int, usable: Tensor):
        """Select this rank's calibration samples.

        Args:
            labels: [n] int64 given labels of this rank.
            num_classes: C.
            usable: [n] bool, samples that may be selected.
        """
        self.num_classes = num_classes
        stride = max(1, -(-int(all_reduce_sum_(usable.sum().double())) // MAX_CALIBRATION_SAMPLES))
        self.samples = usable.nonzero().squeeze(1)[::stride]
        self.labels = labels[self.samples]
        self.class_counts = all_reduce_sum_(torch.bincount(self.labels, minlength=num_classes).double())
        self.num_samples = max(1, int(self.class_counts.sum()))
        self.uniform_errors = uniform_transition_matrix(1.0, num_classes).to(self.class_counts)
        self.rates = candidate_rates(num_classes).to(labels.device)

    def _tiles(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the row numbers [t] and given labels [t] of this rank's calibration samples in tiles."""
        for part in tiles(len(self.samples), width, self.samples.device):
            yield self.samples[part], self.labels[part]

    def calibrate(self, votes: Tensor, rate_prior: Tensor | None = None) -> Calibration:
        """Fit votes to the given labels.

        Args:
            votes: [n, C] held-out votes of this rank.
            rate_prior: [R] log-probability of the rates, from votes calibrated before.
        """
        error_distributions = [self.uniform_errors, self._error_distribution(votes)]
        by_label = [errors.T.contiguous() for errors in error_distributions]
        likelihoods = self.class_counts.new_zeros(2, len(self.rates), len(INVERSE_TEMPERATURES))
        for rows, labels in self._tiles(max(self.num_classes, len(self.rates))):
            label_errors = [errors[labels] for errors in by_label]
            for column, probs in enumerate(temperature_scaled(votes[rows].double())):
                for likelihood, errors in zip(likelihoods, label_errors, strict=True):
                    likelihood[:, column] += _sum_of_logs(_label_probability(probs, labels, errors, self.rates))
        all_reduce_sum_(likelihoods)
        if rate_prior is not None:
            likelihoods += rate_prior[:, None]
        symmetric, asymmetric = likelihoods.amax((1, 2)).tolist()
        # By chance, C (C - 1) free parameters gain half a nat each.
        is_asymmetric = asymmetric - symmetric > self.num_classes * (self.num_classes - 1)
        likelihood = likelihoods[int(is_asymmetric)].clone()
        return Calibration(
            log_likelihood=likelihood,
            error_distribution=error_distributions[int(is_asymmetric)],
            is_asymmetric=is_asymmetric,
            per_sample=(asymmetric if is_asymmetric else symmetric) / self.num_samples,
            entropy=self._mean_entropy(votes, temperature_weights(likelihood)),
            num_samples=self.num_samples,
        )

    def _error_distribution(self, votes: Tensor) -> Tensor:
        """Return D counted against the predicted classes, with a uniform prior of `MATRIX_PRIOR` samples: [C, C]."""
        counts = torch.zeros_like(self.uniform_errors)
        for rows, labels in self._tiles(self.num_classes):
            predicted = votes[rows].argmax(1)
            counts.index_put_((predicted, labels), torch.ones_like(labels, dtype=counts.dtype), accumulate=True)
        return normalize_rows((all_reduce_sum_(counts) + MATRIX_PRIOR * self.uniform_errors).fill_diagonal_(0.0))

    def _mean_entropy(self, votes: Tensor, weights: Mapping[int, float]) -> float:
        """Return the mean entropy of the calibrated votes, in nats."""
        total = self.class_counts.new_zeros(())
        for rows, _ in self._tiles(self.num_classes):
            total += row_entropy(average_over_temperatures(votes[rows].double(), weights)).sum()
        return float(all_reduce_sum_(total)) / self.num_samples

    def prior_log_likelihood(self) -> float:
        """Return the mean log-likelihood of the given labels under the class frequencies, in nats per sample."""
        frequencies = (self.class_counts + 1) / (self.class_counts.sum() + self.num_classes)
        return float(self.class_counts @ frequencies.log()) / self.num_samples

    def fit_ensemble(
        self, members: Sequence[Tensor], error_distribution: Tensor, rate: float | None = None
    ) -> tuple[Tensor, list[float]]:
        """Combine calibrated probabilities as a weighted product, softmax(sum_m w_m log p_m).

        The weights w are averaged over their likelihood. If most labels are wrong, the labels determine w poorly, and
        its most likely value leaves out informative members.

        Args:
            members: M tables [n, C].
            error_distribution: [C, C] D.
            rate: noise rate; None averages over the candidate rates.

        Returns:
            [n, C] combined probabilities, and the M weights.
        """
        rates = self.rates[::5] if rate is None else self.class_counts.new_tensor([rate])
        candidates = self.class_counts.new_tensor(list(_candidate_weights(len(members))))
        likelihood = self.class_counts.new_zeros(len(candidates), len(rates))
        by_label = error_distribution.T.contiguous()
        for rows, labels in self._tiles(len(members) * self.num_classes):
            logs = torch.stack([probs[rows].double().clamp_min_(MIN_MEMBER_PROBABILITY).log_() for probs in members])
            label_errors = by_label[labels]
            for index, candidate in enumerate(candidates):
                probs = torch.einsum("m,mtc->tc", candidate, logs).softmax(1)
                likelihood[index] += _sum_of_logs(_label_probability(probs, labels, label_errors, rates))
        posterior = all_reduce_sum_(likelihood).logsumexp(1).softmax(0)
        weights: list[float] = broadcast((posterior @ candidates).tolist())

        def product(*tables: Tensor) -> Tensor:
            logs = torch.zeros_like(tables[0])
            for weight, probs in zip(weights, tables, strict=True):
                logs = logs + weight * probs.clamp_min(MIN_MEMBER_PROBABILITY).log_()
            return logs.softmax(1)

        return map_tiles(self.num_classes, product, *members), weights


def _candidate_weights(num_members: int) -> Iterator[list[float]]:
    """Yield the candidate weights: each distribution of `WEIGHT_DIVISIONS` equal parts, at each of `WEIGHT_SUMS`."""
    for parts in itertools.combinations_with_replacement(range(num_members), WEIGHT_DIVISIONS):
        for weight_sum in WEIGHT_SUMS:
            yield [weight_sum * parts.count(member) / WEIGHT_DIVISIONS for member in range(num_members)]


def _label_probability(probs: Tensor, labels: Tensor, label_errors: Tensor, rates: Tensor) -> Tensor:
    """Return the probability of the given labels at each rate, at least `MIN_PROBABILITY`: [R, t].

    Args:
        probs: [t, C].
        labels: [t].
        label_errors: [t, C] D(c, y_i) of each class c.
        rates: [R].
    """
    correct, wrong = probs.gather(1, labels[:, None]).squeeze(1), (probs * label_errors).sum(1)
    return torch.lerp(correct, wrong, rates[:, None]).clamp_min_(MIN_PROBABILITY)


def _sum_of_logs(probabilities: Tensor) -> Tensor:
    """Return the sum of logarithms over t of [R, t] float64: one logarithm per product of sixteen factors."""
    product, rest = probabilities.tensor_split([probabilities.shape[1] // 16 * 16], dim=1)
    for _ in range(4):
        first, second = product.chunk(2, dim=1)
        product = first * second
    return product.log_().sum(1) + rest.log().sum(1)
