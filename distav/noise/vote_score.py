"""Scores of held-out votes: how well they predict the given labels.

A held-out vote does not depend on the sample's own label, so that label is evidence on the vote. With an inverse
temperature b, a vote v becomes the class probabilities p = softmax(b log v). If labels are wrong at rate e, and all
wrong labels are equally likely, the given labels y have the log-likelihood

    log L(e, b) = sum_i log[ (1 - e) p_i(y_i) + e (1 - p_i(y_i)) / (C - 1) ]

The score is its maximum over e and b. A vote that carries no information on the class gains no likelihood over the
class frequencies, whatever b is; the more informative of two votes has the larger maximum.
Legend: N samples, n samples of this rank, t samples of a tile, C classes, R rates, S inverse temperatures.
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
RATE_STRIDE = 3
"""Every third candidate rate is tried."""
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
        self.rates = candidate_rates(num_classes)[::RATE_STRIDE].to(labels.device)

    def score(self, votes: Tensor | Callable[[Tensor], Tensor]) -> float:
        """Return the maximum of log L divided by the number of samples, in nats.

        Args:
            votes: [n, C] held-out votes of this rank, or a function that returns those of given rows: [t] -> [t, C].
        """
        votes_of = votes.__getitem__ if isinstance(votes, Tensor) else votes
        likelihood = self.class_counts.new_zeros(len(self.rates), len(INVERSE_TEMPERATURES))
        for rows, labels in self._tiles(max(self.num_classes, len(self.rates))):
            logs = log_votes(votes_of(rows).double())
            for column, scale in enumerate(INVERSE_TEMPERATURES):
                right = (scale * logs).softmax(1).gather(1, labels[:, None]).squeeze(1)
                wrong = (1 - right) / (self.num_classes - 1)
                likelihood[:, column] += _sum_of_logs(
                    torch.lerp(right, wrong, self.rates[:, None]).clamp_min_(MIN_PROBABILITY)
                )
        return float(all_reduce_sum_(likelihood).max()) / self.num_samples

    def gain(self, score: float) -> float:
        """Return the gain in the log-likelihood of the given labels over the class frequencies, in nats."""
        frequencies = self.class_counts[self.class_counts > 0] / self.num_samples
        return self.num_samples * (score - float((frequencies * frequencies.log()).sum()))

    def _tiles(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the row numbers [t] and given labels [t] of this rank's samples in tiles."""
        for part in tiles(len(self.samples), width, self.samples.device):
            yield self.samples[part], self.labels[part]


def _sum_of_logs(probabilities: Tensor) -> Tensor:
    """Return the sum of logarithms over t of [R, t] float64: one logarithm per product of sixteen factors."""
    product, rest = probabilities.tensor_split([probabilities.shape[1] // 16 * 16], dim=1)
    for _ in range(4):
        first, second = product.chunk(2, dim=1)
        product = first * second
    return product.log_().sum(1) + rest.log().sum(1)
