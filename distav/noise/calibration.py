"""What votes are worth and how noisy labels are, told from the given labels alone.

A vote of which a sample's own label had no part is held-out evidence on that label. Let a vote v be sharpened to
p = softmax(b log v), and let labels be wrong at rate e, class c then being taken for y with probability D(c, y). The
given labels y have

    log L(e, b) = sum_i log[ (1 - e) p_i(y_i) + e sum_c p_i(c) D(c, y_i) ]

D is even, 1 / (C - 1) for every other class, unless mistakes seen among the elected classes explain the labels far
better.

Votes that know nothing gain nothing by any b; of two votes the one with more to say of the labels has the larger
maximum. That chooses among neighbourhoods, features and temperatures, calibrates the winner, and estimates the rate,
with no true label in sight.
Legend: N samples, n samples of this rank, t of them at a time, C classes, R rates, S sharpness values.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_, broadcast
from distav.noise.noise_rate import MATRIX_PRIOR, rates, uniform_transition_matrix
from distav.noise.tiling import in_tiles, normalized, tiles

MIN_PROBABILITY = 1e-12
"""Least probability of a label; sixteen of these multiplied are still a number."""
INVERSE_TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.5, 7.0)
PSEUDO_COUNT = 20.0
"""A vote counts as so many, with one more spread over all classes: a class without votes is not ruled out."""
PARTS, STRENGTHS = 4, (0.5, 1.0, 1.5)
"""Weights of experts are tried in quarters of these sums; the sharpness of what they come to is calibrated anew."""
MIN_WEIGHT = 1e-4
"""An expert that gives a class less counts as if it gave so much."""
NEGLIGIBLE = 1e-12
"""Sharpness values of less weight are left out of an average."""
MAX_CALIBRATION_SAMPLES = 20_000
"""Samples on which votes are compared; more say no more."""


@dataclass(frozen=True)
class Calibration:
    """What the given labels say of a vote.

    Attributes:
        likelihood: [R, S] log-likelihood of the given labels, the prior on the rate included.
        confusion: [C, C] D, how wrong labels of each class are spread; rows add up to 1, the diagonal is 0.
        uneven: whether D says that classes are mistaken for particular others.
        per_sample: its maximum over the number of judges, in nats.
        entropy: mean entropy of the calibrated shares, in nats.
        judges: how many samples it was computed on.
    """

    likelihood: Tensor
    error_distribution: Tensor
    is_asymmetric: bool
    per_sample: float
    entropy: float
    num_samples: int

    @property
    def rate_log_likelihood(self) -> Tensor:
        """Log-likelihood of each rate, whatever the sharpness: [R], its largest value 0."""
        by_rate = self.likelihood.logsumexp(1)
        return by_rate - by_rate.max()

    def inverse_temperature(self, votes: Tensor) -> Tensor:
        """Return calibrated class shares, averaged over what the sharpness may be: [n, C] -> [n, C]."""
        weights = temperature_weights(self.likelihood)
        return in_tiles(votes.shape[1], lambda some: blended(some, weights), votes)


def temperature_scaled(votes: Tensor, at: Iterable[int] = range(len(INVERSE_TEMPERATURES))) -> Iterator[Tensor]:
    """Yield votes at each sharpness, softmax(b log v): [t, C] -> S times [t, C].

    One vote spread over all classes is added first.

    Args:
        votes: [t, C].
        at: places in `SHARPNESS`; all of them by default.
    """
    logs = ((PSEUDO_COUNT * votes + 1 / votes.shape[1]) / (PSEUDO_COUNT + 1)).log_()
    for place in at:
        yield (INVERSE_TEMPERATURES[place] * logs).softmax(1)


def blended(votes: Tensor, weights: Mapping[int, float]) -> Tensor:
    """Average votes over sharpness values, by their places in `SHARPNESS` with weights: [t, C] -> [t, C]."""
    return sum(
        (weight * each for weight, each in zip(weights.values(), temperature_scaled(votes, weights), strict=True)),
        torch.zeros_like(votes),
    )


def temperature_weights(likelihood: Tensor) -> dict[int, float]:
    """Return how likely each sharpness is, whatever the rate, without those that have next to no weight.

    Args:
        likelihood: [R, S] log-likelihood.

    Returns:
        Weights by the place in `SHARPNESS`; they add up to 1.
    """
    mass = (likelihood - likelihood.max()).exp().sum(0)
    return {place: weight for place, weight in enumerate((mass / mass.sum()).tolist()) if weight > NEGLIGIBLE}


class VoteCalibrator:
    """The samples whose given labels judge votes: all, or an even part of them where they are many.

    Each rank judges by its own samples, some of them at a time; what comes of it is added up over ranks.
    """

    def __init__(self, own: Tensor, num_classes: int, usable: Tensor):
        """Take part of this rank's samples.

        Args:
            own: [n] int64 given labels.
            num_classes: C.
            usable: [n] bool, samples that may judge.
        """
        self.num_classes = num_classes
        stride = max(1, -(-int(all_reduce_sum_(usable.sum().double())) // MAX_CALIBRATION_SAMPLES))
        self.chosen = usable.nonzero().squeeze(1)[::stride]
        self.labels = own[self.chosen]
        self.counts = all_reduce_sum_(torch.bincount(self.labels, minlength=num_classes).double())
        self.number = max(1, int(self.counts.sum()))
        self.even, self.rates = (
            uniform_transition_matrix(1.0, num_classes).to(self.counts),
            rates(num_classes).to(own.device),
        )

    def _tiles(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield places [t] and given labels [t] of some of this rank's judges at a time."""
        for part in tiles(len(self.chosen), width, self.chosen.device):
            yield self.chosen[part], self.labels[part]

    def calibrate(self, votes: Tensor, prior: Tensor | None = None) -> Calibration:
        """Compare votes with the given labels.

        Args:
            votes: [n, C] of this rank, each without a part of the sample's own label.
            prior: [R] log-probability of the rates, from votes judged before.
        """
        at = self.rates
        confusions = [self.even, self._confusion(votes)]
        by_label = [each.T.contiguous() for each in confusions]
        likelihoods = self.counts.new_zeros(len(confusions), len(at), len(INVERSE_TEMPERATURES))
        for rows, labels in self._tiles(max(self.num_classes, len(at))):
            mistaken = [each[labels] for each in by_label]
            for column, shares in enumerate(temperature_scaled(votes[rows].double())):
                for likelihood, wrong in zip(likelihoods, mistaken, strict=True):
                    likelihood[:, column] += _log_product(_mixed(shares, labels, wrong, at))
        all_reduce_sum_(likelihoods)
        if prior is not None:
            likelihoods += prior[:, None]
        even, seen = likelihoods.amax((1, 2)).tolist()
        # As many free numbers would gain half a nat each by chance.
        uneven = seen - even > self.num_classes * (self.num_classes - 1)
        likelihood = likelihoods[int(uneven)].clone()
        entropy = self._entropy(votes, temperature_weights(likelihood))
        per_sample = (seen if uneven else even) / self.number
        return Calibration(likelihood, confusions[int(uneven)], uneven, per_sample, entropy, self.number)

    def _confusion(self, votes: Tensor) -> Tensor:
        """Return how the labels of each elected class are spread over the others, drawn towards evenness: [C, C]."""
        counts = torch.zeros_like(self.even)
        for rows, labels in self._tiles(self.num_classes):
            elected = votes[rows].argmax(1)
            counts.index_put_((elected, labels), torch.ones_like(labels, dtype=counts.dtype), accumulate=True)
        counts = (all_reduce_sum_(counts) + MATRIX_PRIOR * self.even).fill_diagonal_(0.0)
        return normalized(counts)

    def _entropy(self, votes: Tensor, weights: Mapping[int, float]) -> float:
        """Return the mean entropy of calibrated votes, in nats."""
        total = self.counts.new_zeros(())
        for rows, _ in self._tiles(self.num_classes):
            total += entropies(blended(votes[rows].double(), weights)).sum()
        return float(all_reduce_sum_(total)) / self.number

    def prior_log_likelihood(self) -> float:
        """Return the mean log-likelihood of the labels where nothing is known but how frequent each is."""
        shares = (self.counts + 1) / (self.counts.sum() + self.num_classes)
        return float(self.counts @ shares.log()) / self.number

    def fit_ensemble(
        self, experts: Sequence[Tensor], confusion: Tensor, rate: float | None = None
    ) -> tuple[Tensor, list[float]]:
        """Weigh calibrated shares by what they add: softmax(sum_m w_m log p_m), w averaged over what it may be.

        Where most labels are wrong, they say little of w, and its likeliest value leaves out what others have to say.

        Args:
            experts: [n, C] each.
            confusion: [C, C] D.
            rate: the noise rate, or None where it is not known.

        Returns:
            [n, C] pooled shares, and the weights.
        """
        at = self.rates[::5] if rate is None else self.counts.new_tensor([rate])
        tried = self.counts.new_tensor(list(_weightings(len(experts))))
        likelihood, by_label = self.counts.new_zeros(len(tried), len(at)), confusion.T.contiguous()
        for rows, labels in self._tiles(len(experts) * self.num_classes):
            logs = torch.stack([each[rows].double().clamp_min_(MIN_WEIGHT).log_() for each in experts])
            mistaken = by_label[labels]
            for place, weights in enumerate(tried):
                shares = torch.einsum("m,mtc->tc", weights, logs).softmax(1)
                likelihood[place] += _log_product(_mixed(shares, labels, mistaken, at))
        averaged: list[float] = broadcast((all_reduce_sum_(likelihood).logsumexp(1).softmax(0) @ tried).tolist())

        def product(*some: Tensor) -> Tensor:
            logs = (weight * each.clamp_min(MIN_WEIGHT).log_() for weight, each in zip(averaged, some, strict=True))
            return sum(logs, torch.zeros_like(some[0])).softmax(1)

        return in_tiles(self.num_classes, product, *experts), averaged


def entropies(shares: Tensor) -> Tensor:
    """Return the entropy of each row in nats: [t, C] -> [t]."""
    return -(shares * shares.clamp_min(1e-30).log_()).sum(1)


def _weightings(experts: int) -> Iterator[list[float]]:
    """Yield the weights that are tried: every way to deal out so many parts, at each strength."""
    for dealt in itertools.combinations_with_replacement(range(experts), PARTS):
        for strength in STRENGTHS:
            yield [strength * dealt.count(expert) / PARTS for expert in range(experts)]


def _mixed(shares: Tensor, labels: Tensor, mistaken: Tensor, at: Tensor) -> Tensor:
    """Return the probability of given labels at each rate.

    Args:
        shares: [J, C].
        labels: [J].
        mistaken: [J, C] D(c, y_i) of every class c.
        at: [R] rates.

    Returns:
        [R, J], at least `RAREST`.
    """
    right, wrong = shares.gather(1, labels[:, None]).squeeze(1), (shares * mistaken).sum(1)
    return torch.lerp(right, wrong, at[:, None]).clamp_min_(MIN_PROBABILITY)


def _log_product(probabilities: Tensor) -> Tensor:
    """Return the sum of logarithms of [R, J] float64 over J; sixteen are multiplied before one logarithm is taken."""
    product, rest = probabilities.tensor_split([probabilities.shape[1] // 16 * 16], dim=1)
    for _ in range(4):
        one, other = product.chunk(2, dim=1)
        product = one * other
    return product.log_().sum(1) + rest.log().sum(1)
