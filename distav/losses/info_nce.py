"""Similarity scores of a sample with its own candidate and its negatives, which come from the batch or the memory bank.

Two sources of negatives share one interface: they score every sample against its candidates and turn a loss over
scores into per-sample losses with gradient. The results do not depend on the number of ranks.

Legend: b samples of this rank, B of all ranks, M candidates, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.distributed.collectives import all_gather_rows_with_grad, get_rank, local_batch
from distav.losses.known_gradient import attach_gradient
from distav.memory.bank import Bank
from distav.memory.global_batch import GlobalBatch
from distav.memory.negative_sampling import NegativeSampling, Partition, SampledRows

Directions = tuple[tuple[str, str], ...]
"""Pairs of modalities: embeddings of the first are the queries, embeddings of the second the candidates."""
CROSS_MODAL: Directions = (("visual", "audio"), ("audio", "visual"))
"""Cross-modal directions (Cross-AVID)."""
WITHIN_MODAL: Directions = (("visual", "visual"), ("audio", "audio"))
"""Within-modal directions (Self-AVID); both kinds together are Joint-AVID (Morgado et al. 2021a, section 3.2)."""

ScoreLoss = Callable[[Tensor, Tensor], Tensor]
"""Scores [b, M] and index of each row's own candidate [b] -> losses [b]; a row's loss depends on that row alone."""


class _Negatives:
    """Scores in both cross-modal directions.

    Attributes:
        scores: [b, M] for each direction, dot products divided by the temperature; -inf at masked candidates.
        own: [b] index of the own candidate.
    """

    scores: list[Tensor]
    own: Tensor

    def matching_probability(self) -> Tensor:
        """Return the softmax probability of the own candidate, averaged over the directions: [b], without gradient."""
        probs = [scores.detach().softmax(1).gather(1, self.own[:, None]).squeeze(1) for scores in self.scores]
        return torch.stack(probs).mean(0)

    def num_candidates(self) -> Tensor:
        """Return the number of candidates of each sample, its own included: [b]."""
        return torch.isfinite(self.scores[0]).sum(1)


class InBatchNegatives(_Negatives):
    """Candidates are all samples of the global batch; gradients flow to both sides of a score."""

    def __init__(self, global_batch: GlobalBatch, visual: Tensor, audio: Tensor, temperature: float | Tensor):
        """Score this rank's samples, unit vectors [b, D] per modality, against those of all ranks."""
        visual, audio = visual.float(), audio.float()
        visual_rows, audio_rows = all_gather_rows_with_grad(torch.cat([visual, audio], 1)).chunk(2, dim=1)
        queries, rows = {"visual": visual, "audio": audio}, {"visual": visual_rows, "audio": audio_rows}
        first = get_rank() * len(visual)
        self.own = torch.arange(first, first + len(visual), device=visual.device)
        same_sample = global_batch.ids == local_batch(global_batch.ids)[:, None]
        self.scores = []
        for query, candidate in CROSS_MODAL:
            masked = (~global_batch.present[candidate] | same_sample).scatter(1, self.own[:, None], False)
            scores = queries[query] @ rows[candidate].T / temperature
            self.scores.append(scores.masked_fill(masked, -torch.inf))

    def losses(self, score_loss: ScoreLoss) -> Tensor:
        """Return the loss of each sample, summed over both directions: [b]."""
        return torch.stack([score_loss(scores, self.own) for scores in self.scores]).sum(0)


class SampledNegatives(_Negatives):
    """Candidates are a sample's own bank row, at index 0, and sampled rows; gradients flow to the queries."""

    def __init__(
        self,
        bank: Bank,
        global_batch: GlobalBatch,
        visual: Tensor,
        audio: Tensor,
        temperature: float | Tensor,
        sampling: NegativeSampling,
    ):
        """Score this rank's samples, unit vectors [b, D] per modality, against rows of the memory bank."""
        self.temperature = temperature
        self.queries = {"visual": visual, "audio": audio}
        global_queries = {"visual": global_batch.visual, "audio": global_batch.audio}
        self.rows: dict[str, Tensor] = dict(zip(MODALITIES, bank.fetch(MODALITIES, global_batch.ids), strict=True))
        self.sampled = SampledRows(bank, global_batch.ids, sampling)
        self.own = torch.zeros(len(visual), dtype=torch.int64, device=visual.device)
        tau = temperature.detach() if isinstance(temperature, Tensor) else temperature
        self.scores = []
        for query, candidate in CROSS_MODAL:
            positive = (self.queries[query].detach() * self.rows[candidate]).sum(1, keepdim=True)
            products = self.sampled.products(global_queries[query], candidate)
            missing = self.sampled.missing(candidate)
            if missing is not None:
                products = products.masked_fill(missing, -torch.inf)
            self.scores.append(torch.cat([positive, products], dim=1) / tau)

    def losses(self, score_loss: ScoreLoss) -> Tensor:
        """Return the loss of each sample, summed over both directions: [b]."""
        total = torch.zeros_like(self.rows["visual"][:, 0])
        tau = self.temperature.detach() if isinstance(self.temperature, Tensor) else self.temperature
        for (query, candidate), scores in zip(CROSS_MODAL, self.scores, strict=True):
            # The bank is updated before the backward pass, so the gradient is computed from the current rows.
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                losses = score_loss(leaf, self.own)
                factors = torch.autograd.grad(losses.sum(), leaf)[0]
            by_query = factors[:, :1] * self.rows[candidate] + self.sampled.weighted_sums(factors[:, 1:], candidate)
            total = total + attach_gradient(self.queries[query], self.temperature, losses.detach(), by_query / tau)
        return total


def cross_entropy(scores: Tensor, own: Tensor) -> Tensor:
    """Return -log of the own candidate's softmax probability (InfoNCE; van den Oord et al. 2018, equation 4): [b]."""
    return scores.logsumexp(1) - scores.gather(1, own[:, None]).squeeze(1)


def noise_contrastive(partition: Partition) -> ScoreLoss:
    """Return the noise-contrastive loss of the own candidate, the first one, and the sampled ones (AVID equation 1).

    It is binary cross-entropy against M Z: softplus(log MZ - s) + sum_n softplus(s_n - log MZ).
    """

    def score_loss(scores: Tensor, _own: Tensor) -> Tensor:
        negatives = scores[:, 1:]
        logits = scores - math.log(negatives.shape[1] * partition.get_or_estimate(negatives.detach()))
        return F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(1)

    return score_loss
