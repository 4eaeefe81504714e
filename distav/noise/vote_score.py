"""Scores of held-out votes: how well they predict the given labels.

A held-out vote does not depend on the sample's own label, so that label is evidence on the vote. With an inverse
temperature b, a vote v becomes the class probabilities p = softmax(b log v). If labels are wrong at rate e, and all
wrong labels are equally likely, the given labels y have the log-likelihood

    log L(e, b) = sum_i log[ (1 - e) p_i(y_i) + e (1 - p_i(y_i)) / (C - 1) ]

The score is its maximum over e and b; it is concave in e, which is found by Newton's method. A vote that carries no
information on the class gains no likelihood over the class frequencies, whatever b is; the more informative of two
votes has the larger maximum.
Legend: N samples, n samples of this rank, t samples of a tile, C classes, S inverse temperatures.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_
from distav.noise.noise_rate import candidate_rates
from distav.noise.tiling import tiles

MIN_PROBABILITY = 1e-12
"""Lower bound of the probability of a label; a product of sixteen of them is still a normal number."""
INVERSE_TEMPERATURES = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.5, 7.0)
NEWTON_STEPS = 6
"""Steps of Newton's method; one that leaves the bracket of the maximum halves the bracket instead."""
PSEUDO_COUNT = 20.0
"""Weight of a vote relative to one uniform vote that is added to it, so that no class has probability 0."""
MAX_SCORED_SAMPLES = 20_000
"""Samples on which votes are compared; more samples do not change the selection."""


def log_votes(votes: Tensor) -> Tensor:
    """Return the logarithms of votes to which a uniform vote is added, see `PSEUDO_COUNT`: [t, C] -> [t, C]."""
    return ((PSEUDO_COUNT * votes + 1 / votes.shape[1]) / (PSEUDO_COUNT + 1)).log_()


class VoteScorer:
    """Scores votes on the given labels of all samples, or of a random subset of a large dataset.

    Each rank processes its own samples in tiles; the sums are reduced over all ranks.
    """

    def __init__(self, labels: Tensor, num_classes: int, usable: Tensor):
        """Select this rank's samples.

        Args:
            labels: [n] int64 given labels of this rank.
            num_classes: C.
            usable: [n] bool, samples that may be selected.
        """
        self.num_classes = num_classes
        samples = usable.nonzero().squeeze(1)
        fraction = min(1.0, MAX_SCORED_SAMPLES / max(1.0, float(all_reduce_sum_(usable.sum().double()))))
        # Random, because the classes of a dataset may be interleaved.
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).to(samples.device)
        self.samples = samples[order[: round(fraction * len(samples))].sort().values]
        self.labels = labels[self.samples]
        self.class_counts = all_reduce_sum_(torch.bincount(self.labels, minlength=num_classes).double())
        self.num_samples = max(1, int(self.class_counts.sum()))
        self.largest_rate = float(candidate_rates(num_classes)[-1])

    def score(self, votes: Tensor | Callable[[Tensor], Tensor]) -> float:
        """Return the maximum of log L divided by the number of samples, in nats.

        Args:
            votes: [n, C] held-out votes of this rank, or a function that returns those of given rows: [t] -> [t, C].
        """
        votes_of = votes.__getitem__ if isinstance(votes, Tensor) else votes
        parts = []
        for rows, labels in self._tiles():
            # Classes first, which is faster.
            logs = log_votes(votes_of(rows).double()).t().contiguous()
            given = logs.gather(0, labels[None]).squeeze(0)
            parts.append(
                torch.stack([(scale * given - (scale * logs).logsumexp(0)).exp() for scale in INVERSE_TEMPERATURES])
            )
        right = torch.cat(parts, dim=1) if parts else self.class_counts.new_zeros(len(INVERSE_TEMPERATURES), 0)
        return self._largest_log_likelihood(right) / self.num_samples

    def _largest_log_likelihood(self, right: Tensor) -> float:
        """Return the maximum of the log-likelihood over the rates: [S, n] probabilities of the given labels."""
        slope = (1 - right) / (self.num_classes - 1) - right
        low, high = right.new_zeros(len(right)), right.new_full((len(right),), self.largest_rate)
        rate = (low + high) / 2
        for _ in range(NEWTON_STEPS):
            ratio = slope / torch.addcmul(right, slope, rate[:, None]).clamp_min_(MIN_PROBABILITY)
            first, second = all_reduce_sum_(torch.stack([ratio.sum(1), ratio.square().sum(1)]))
            low, high = torch.where(first > 0, rate, low), torch.where(first > 0, high, rate)
            newton = rate + first / second.clamp_min(MIN_PROBABILITY)
            rate = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        rates = torch.stack([rate, torch.zeros_like(rate), torch.full_like(rate, self.largest_rate)])
        likelihoods = [
            _sum_of_logs(torch.addcmul(right, slope, values[:, None]).clamp_min_(MIN_PROBABILITY)) for values in rates
        ]
        return float(all_reduce_sum_(torch.stack(likelihoods)).max())

    def gain(self, score: float) -> float:
        """Return the gain in the log-likelihood of the given labels over the class frequencies, in nats."""
        frequencies = self.class_counts[self.class_counts > 0] / self.num_samples
        return self.num_samples * (score - float((frequencies * frequencies.log()).sum()))

    def _tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the row numbers [t] and given labels [t] of this rank's samples in tiles."""
        for part in tiles(len(self.samples), self.num_classes, self.samples.device):
            yield self.samples[part], self.labels[part]


def _sum_of_logs(probabilities: Tensor) -> Tensor:
    """Return the sum of logarithms over n of [S, n] float64: one logarithm per product of sixteen factors."""
    product, rest = probabilities.tensor_split([probabilities.shape[1] // 16 * 16], dim=1)
    for _ in range(4):
        first, second = product.chunk(2, dim=1)
        product = first * second
    return product.log_().sum(1) + rest.log().sum(1)
