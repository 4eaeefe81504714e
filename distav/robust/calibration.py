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
Legend: N samples, n samples of this rank, C classes, R rates, S sharpness values.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.robust.noise_rate import MATRIX_PRIOR, even_matrix, rates
from distav.world import broadcast, gather_ragged_rows, sum_

RAREST = 1e-12
"""Least probability of a label; sixteen of these multiplied are still a number."""
SHARPNESS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.5, 7.0)
FLOOR = 20.0
"""A vote counts as so many, with one more spread over all classes: a class without votes is not ruled out."""
PARTS, STRENGTHS = 4, (0.5, 1.0, 1.5)
"""Weights of experts are tried in quarters of these sums; the sharpness of what they come to is calibrated anew."""
MOST_JUDGES = 20_000
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
    confusion: Tensor
    uneven: bool
    per_sample: float
    entropy: float
    judges: int

    @property
    def evidence(self) -> Tensor:
        """Log-likelihood of each rate, whatever the sharpness: [R], its largest value 0."""
        by_rate = self.likelihood.logsumexp(1)
        return by_rate - by_rate.max()

    def sharpened(self, votes: Tensor) -> Tensor:
        """Return calibrated class shares, averaged over what the sharpness may be: [n, C] -> [n, C]."""
        return _averaged(self.likelihood, sharpened(votes))


def sharpened(votes: Tensor) -> list[Tensor]:
    """Return votes at each sharpness, softmax(b log v): [n, C] -> S times [n, C].

    One vote spread over all classes is added first.
    """
    logs = ((FLOOR * votes + 1 / votes.shape[1]) / (FLOOR + 1)).log()
    return [(sharpness * logs).softmax(1) for sharpness in SHARPNESS]


def _averaged(likelihood: Tensor, shares: Sequence[Tensor]) -> Tensor:
    """Average votes over what the sharpness may be: [R, S] and S times [n, C] -> [n, C]."""
    mass = (likelihood - likelihood.max()).exp().sum(0)
    mass = (mass / mass.sum()).tolist()
    return sum((share * each for share, each in zip(mass, shares, strict=True)), torch.zeros_like(shares[0]))


class Judges:
    """The samples whose given labels judge votes: all, or an even part of them where they are many."""

    def __init__(self, own: Tensor, num_classes: int, usable: Tensor):
        """Take part of this rank's samples.

        Args:
            own: [n] int64 given labels.
            num_classes: C.
            usable: [n] bool, samples that may judge.
        """
        self.num_classes = num_classes
        stride = max(1, -(-int(sum_(usable.sum().double())) // MOST_JUDGES))
        self.chosen = usable.nonzero().squeeze(1)[::stride]
        self.labels = gather_ragged_rows(own[self.chosen])

    def gather(self, votes: Tensor) -> Tensor:
        """Return the judges' rows of [n, C], the same on every rank: [J, C] float64."""
        return gather_ragged_rows(votes[self.chosen]).double()

    def calibrate(self, votes: Tensor, prior: Tensor | None = None) -> Calibration:
        """Compare votes with the given labels.

        Args:
            votes: [n, C] of this rank, each without a part of the sample's own label.
            prior: [R] log-probability of the rates, from votes judged before.
        """
        gathered = self.gather(votes)
        shares = sharpened(gathered)
        even = self._judge(shares, even_matrix(1.0, self.num_classes).to(gathered), False, prior)
        seen = self._judge(shares, self._confusion(gathered), True, prior)
        # As many free numbers would gain half a nat each by chance.
        better = (seen.per_sample - even.per_sample) * even.judges > self.num_classes * (self.num_classes - 1)
        return seen if better else even

    def _confusion(self, votes: Tensor) -> Tensor:
        """Return how the labels of each elected class are spread over the others, drawn towards evenness: [C, C]."""
        counts = MATRIX_PRIOR * even_matrix(1.0, self.num_classes).to(votes)
        counts.index_put_((votes.argmax(1), self.labels), votes.new_ones(len(votes)), accumulate=True)
        counts.fill_diagonal_(0.0)
        return counts / counts.sum(1, keepdim=True)

    def _judge(self, votes: Sequence[Tensor], confusion: Tensor, uneven: bool, prior: Tensor | None) -> Calibration:
        at = rates(self.num_classes).to(confusion.device)
        mistaken = confusion[:, self.labels].T
        columns = [_log_product(_mixed(shares, self.labels, mistaken, at)) for shares in votes]
        likelihood = torch.stack(columns, dim=1)
        if prior is not None:
            likelihood = likelihood + prior[:, None]
        count = max(1, len(self.labels))
        shares = _averaged(likelihood, votes)
        entropy = float(-(shares * shares.clamp_min(1e-30).log()).sum(1).mean())
        return Calibration(likelihood, confusion, uneven, float(likelihood.max()) / count, entropy, count)

    def chance(self) -> float:
        """Return the mean log-likelihood of the labels where nothing is known but how frequent each is."""
        counts = torch.bincount(self.labels, minlength=self.num_classes).double()
        shares = (counts + 1) / (counts.sum() + self.num_classes)
        return float(shares.log()[self.labels].mean())

    def pool(
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
        stacked = torch.stack([self.gather(each).clamp_min(1e-4).log() for each in experts])
        at = rates(self.num_classes)[::5] if rate is None else torch.tensor([rate], dtype=torch.float64)
        at, mistaken = at.to(stacked.device), confusion[:, self.labels].T
        tried = stacked.new_tensor(list(_weightings(len(experts))))
        likelihood = []
        for weights in tried:
            shares = torch.einsum("m,mjc->jc", weights, stacked).softmax(1)
            likelihood.append(_log_product(_mixed(shares, self.labels, mistaken, at)).logsumexp(0))
        averaged: list[float] = broadcast((torch.stack(likelihood).softmax(0) @ tried).tolist())
        logs = sum(
            (weight * each.clamp_min(1e-4).log() for weight, each in zip(averaged, experts, strict=True)),
            torch.zeros_like(experts[0]),
        )
        return logs.softmax(1), averaged


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
    return torch.lerp(right, wrong, at[:, None]).clamp_min(RAREST)


def _log_product(probabilities: Tensor) -> Tensor:
    """Return the sum of logarithms of [R, J] float64 over J; sixteen are multiplied before one logarithm is taken."""
    product = F.pad(probabilities, (0, -probabilities.shape[1] % 16), value=1.0)
    for _ in range(4):
        one, other = product.chunk(2, dim=1)
        product = one * other
    return product.log().sum(1)
