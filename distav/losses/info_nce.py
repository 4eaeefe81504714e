"""What a sample's pair is told from: the others of the batch, or rows drawn from the bank.

Both give scores of every sample with its candidates, one of which is its own, and turn any loss over such scores into
one with gradient, the same on any number of ranks.
Legend: b samples of this rank, B of all ranks, M candidates, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_gather_rows_with_grad, get_rank, local_batch
from distav.losses.known_gradient import attach_gradient
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling, Partition, SampledRows

MODALITIES = ("visual", "audio")
Directions = tuple[tuple[str, str], ...]
DIRECTIONS: Directions = (("visual", "audio"), ("audio", "visual"))
"""Whose embedding is compared with whose rows: across the modalities (Cross-AVID)."""
WITHIN: Directions = (("visual", "visual"), ("audio", "audio"))
"""Within each modality (Self-AVID); both together are Joint-AVID (Morgado et al. 2021a, section 3.2)."""

ScoreLoss = Callable[[Tensor, Tensor], Tensor]
"""Scores [b, M] and the place of each row's own candidate [b] -> losses [b]; a row's loss hangs on that row alone."""


class _Candidates:
    """Scores in several directions.

    Attributes:
        scores: for each direction [b, M], dot products over the temperature; -inf where a candidate is none.
        own: [b] place of the own candidate.
    """

    scores: list[Tensor]
    own: Tensor

    def matching_probability(self) -> Tensor:
        """Return the softmax share of the own candidate, the mean over the directions: [b], without gradient."""
        shares = [each.detach().softmax(1).gather(1, self.own[:, None]).squeeze(1) for each in self.scores]
        return torch.stack(shares).mean(0)

    def num_candidates(self) -> Tensor:
        """Return how many candidates each sample has, itself included: [b]."""
        return torch.isfinite(self.scores[0]).sum(1)


class InBatchNegatives(_Candidates):
    """All samples of the batch, over all ranks; gradients flow to both sides of a score."""

    def __init__(self, visitors: GlobalBatch, visual: Tensor, audio: Tensor, temperature: float | Tensor):
        """Compare the samples of this rank, embedded in [b, D] unit vectors each, with those of all ranks."""
        visual, audio = visual.float(), audio.float()
        every: dict[str, Tensor] = dict(
            zip(MODALITIES, all_gather_rows_with_grad(torch.cat([visual, audio], 1)).chunk(2, dim=1), strict=True)
        )
        queries = {"visual": visual, "audio": audio}
        first = get_rank() * len(visual)
        self.own = torch.arange(first, first + len(visual), device=visual.device)
        closed = ~visitors.valid | (visitors.ids == local_batch(visitors.ids)[:, None])
        closed = closed.scatter(1, self.own[:, None], False)
        self.scores = [
            (queries[asking] @ every[answering].T / temperature).masked_fill(closed, -torch.inf)
            for asking, answering in DIRECTIONS
        ]

    def losses(self, loss_of: ScoreLoss) -> Tensor:
        """Return each sample's loss, the sum over both directions: [b]."""
        return torch.stack([loss_of(each, self.own) for each in self.scores]).sum(0)


class SampledNegatives(_Candidates):
    """A sample's own row of the bank, first, and drawn ones; gradients flow to the queries."""

    def __init__(
        self,
        bank: Bank,
        visitors: GlobalBatch,
        visual: Tensor,
        audio: Tensor,
        temperature: float | Tensor,
        draw: NegativeSampling,
        directions: Directions = DIRECTIONS,
    ):
        """Compare the samples of this rank, embedded in [b, D] unit vectors each, with rows of the bank."""
        self.directions, self.temperature = directions, temperature
        self.queries = {"visual": visual, "audio": audio}
        self.rows: dict[str, Tensor] = dict(zip(MODALITIES, bank.fetch(MODALITIES, visitors.ids), strict=True))
        self.drawn = SampledRows(bank, visitors.ids, draw)
        self.own = torch.zeros(len(visual), dtype=torch.int64, device=visual.device)
        tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
        self.scores = []
        for asking, answering in directions:
            positive = (self.queries[asking].detach() * self.rows[answering]).sum(1, keepdim=True)
            products = self.drawn.products(getattr(visitors, asking), answering)
            self.scores.append(torch.cat([positive, products], dim=1) / tau)

    def losses(self, loss_of: ScoreLoss) -> Tensor:
        """Return each sample's loss, the sum over the directions: [b]."""
        total = torch.zeros_like(self.rows["visual"][:, 0])
        tau = self.temperature.detach() if isinstance(self.temperature, Tensor) else self.temperature
        for (asking, answering), scores in zip(self.directions, self.scores, strict=True):
            # The rows move on before the backward pass, so the gradient is found while they are as they were.
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                losses = loss_of(leaf, self.own)
                factors = torch.autograd.grad(losses.sum(), leaf)[0]
            by_query = factors[:, :1] * self.rows[answering] + self.drawn.sums(factors[:, 1:], answering)
            total = total + attach_gradient(self.queries[asking], self.temperature, losses.detach(), by_query / tau)
        return total


def cross_entropy(scores: Tensor, own: Tensor) -> Tensor:
    """Return -log of the own candidate's softmax share (InfoNCE; van den Oord et al. 2018, equation 4)."""
    return scores.logsumexp(1) - scores.gather(1, own[:, None]).squeeze(1)


def noise_contrastive(partition: Partition) -> ScoreLoss:
    """Return the loss that tells the own candidate, the first, from the drawn ones one by one (AVID equation 1).

    It is binary cross-entropy against M Z: softplus(log MZ - s) + sum_n softplus(s_n - log MZ).
    """

    def loss_of(scores: Tensor, own: Tensor) -> Tensor:
        del own
        drawn = scores[:, 1:]
        above = scores - math.log(drawn.shape[1] * partition.take(drawn.detach()))
        return F.softplus(-above[:, 0]) + F.softplus(above[:, 1:]).sum(1)

    return loss_of
