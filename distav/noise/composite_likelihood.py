"""Composite likelihood of the given labels under the model of `distav.noise.vote_model`.

    sum_i log P(y_i | V_i, A_i) + (log P(y_i | V_i) + log P(y_i | A_i)) / 2

plus weak priors of the inverse temperatures. The agreement of the two modalities determines only the mismatch rate and
the owner of the labels, by expectation-maximization: neighbors that vote in both modalities make wrong votes agree, and
without a label signal this agreement must not make votes look informative.

Under asymmetric noise T is estimated by expectation-maximization in two folds of the samples; each fold uses the T of
the other, so that the free parameters of T gain no likelihood by chance.
Legend: n samples, C classes, G noise rates, F = 2 folds, S parameters of the votes.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from distav.noise.vote_model import (
    ClassProbs,
    LabelLikelihood,
    LabelNoise,
    Parameters,
    Votes,
    class_probs,
    label_likelihood,
)

SINGLE_WEIGHT = 0.5
"""Weight of the likelihood of each single modality in the composite likelihood."""
MATRIX_PRIOR = 20.0
"""Weight of symmetric noise in an estimated transition matrix, in samples per class."""
MIN_ERROR_PRIOR = 5.0
"""Smallest weight of symmetric noise in the distribution of the wrong labels of a class, in samples."""


class CompositeLikelihood:
    """Likelihood of the labels of the samples that the model is fitted to."""

    def __init__(self, votes: Votes, labels: Tensor, num_classes: int, weights: Tensor):
        """Store the samples.

        Args:
            votes: votes of n samples.
            labels: [n] int64 given labels.
            num_classes: C.
            weights: [n] weights of the samples, mean 1.
        """
        self.votes, self.labels, self.num_classes, self.weights = votes, labels, num_classes, weights
        # Random, because the classes of a dataset may be interleaved.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.fold = (order % 2).to(labels.device)
        counts = weights.new_zeros(num_classes).index_add_(0, labels, weights) + 1
        self.frequencies = counts / counts.sum()
        uses = (len(votes.visual), len(votes.audio), len(votes.visual) + len(votes.audio) + len(votes.joint))
        means = [math.log(total / max(1, use)) for total, use in zip((1.5, 1.5, 3.0), uses, strict=True)]
        device = weights.device
        counts_of_means = zip(means, uses, strict=True)
        self.prior_mean = torch.tensor(
            [mean for mean, use in counts_of_means for _ in range(use)] + 3 * [-5.0], device=device
        )
        deviations = [0.5] * (uses[0] + uses[1]) + [1.0] * uses[2] + 3 * [0.5]
        self.prior_deviation = torch.tensor(deviations, device=device)

    @property
    def baseline(self) -> float:
        """Composite log-likelihood of the given labels under the class frequencies."""
        single = SINGLE_WEIGHT * (self.votes.has_visual.float() + self.votes.has_audio.float())
        return float((self.frequencies.log()[self.labels] * self.weights * (1 + single)).sum())

    def pair_objective(self, parameters: Parameters, label_probs: Tensor | None) -> Tensor:
        """Return the objective with the log-likelihood of the agreement of both modalities: [G] float64."""
        ratio = class_probs(parameters, self.votes).ratio
        mismatch, paired = parameters.mismatch, self.votes.paired
        agreement = ((1 - mismatch) * ratio + mismatch).log() * paired
        return self.objective(parameters, label_probs) + (agreement * self.weights).double().sum(1)

    def objective(self, parameters: Parameters, label_probs: Tensor | None) -> Tensor:
        """Return the composite log-likelihood plus the logarithm of the priors: [G] float64."""
        probs = class_probs(parameters, self.votes)
        likelihood = label_likelihood(parameters, probs, self.labels, label_probs, self.votes.paired)
        single_visual, single_audio = self._single_likelihoods(parameters, likelihood)
        total = likelihood.owner.clamp_min(1e-12).log()
        total = total + SINGLE_WEIGHT * (single_visual.clamp_min(1e-12).log() * self.votes.has_visual)
        total = total + SINGLE_WEIGHT * (single_audio.clamp_min(1e-12).log() * self.votes.has_audio)
        deviations = (parameters.votes - self.prior_mean) / self.prior_deviation
        return (total * self.weights).double().sum(1) - 0.5 * deviations.double().square().sum(1)

    def _single_likelihoods(self, parameters: Parameters, likelihood: LabelLikelihood) -> tuple[Tensor, Tensor]:
        """Return P(y | V) and P(y | A): [G, n] each."""
        mismatch = torch.where(self.votes.paired, parameters.mismatch, 0.0)
        owner, frequencies = parameters.visual_owner, parameters.frequencies
        matrices = parameters.noise.matrices
        if matrices is None:
            chance = parameters.noise.likelihood(
                frequencies[:, None].expand(-1, len(self.labels), -1), self.labels, None
            )
        else:
            chance = torch.einsum("gc,gfcy->gfy", frequencies, matrices)[:, self.fold, self.labels]
        visual_unknown, audio_unknown = mismatch * (1 - owner), mismatch * owner
        return (
            (1 - visual_unknown) * likelihood.visual + visual_unknown * chance,
            (1 - audio_unknown) * likelihood.audio + audio_unknown * chance,
        )

    @torch.no_grad()
    def maximize(self, parameters: Parameters, iterations: int) -> Parameters:
        """Update m, w and, under asymmetric noise, T and pi by expectation-maximization at fixed votes."""
        probs, paired = class_probs(parameters, self.votes), self.votes.paired
        for _ in range(iterations):
            label_probs = parameters.noise.probabilities(self.labels, self.fold)
            likelihood = label_likelihood(parameters, probs, self.labels, label_probs, paired)
            mismatch, owner = parameters.mismatch, parameters.visual_owner
            matched = (1 - mismatch) * probs.ratio * likelihood.fused
            visual = mismatch * owner * likelihood.visual
            audio = mismatch * (1 - owner) * likelihood.audio
            total = matched + visual + audio
            matched, visual, audio = (
                torch.where(paired, part / total, fill)
                for part, fill in zip((matched, visual, audio), (1.0, 0.0, 0.0), strict=True)
            )
            weights = self.weights * paired
            visual_sum, audio_sum = ((part * weights).sum(1, keepdim=True) for part in (visual, audio))
            parameters = replace(
                parameters,
                mismatch=((visual_sum + audio_sum + 1) / (weights.sum() + 4)).clamp(1e-4, 0.97),
                visual_owner=((visual_sum + 0.7) / (visual_sum + audio_sum + 1)).clamp(0.005, 0.995),
            )
            if label_probs is not None:
                shares = [matched / likelihood.fused, visual / likelihood.visual, audio / likelihood.audio]
                classes = sum(
                    share[..., None] * table
                    for share, table in zip(shares, (probs.fused, probs.visual, probs.audio), strict=True)
                )
                parameters = self._update_matrices(parameters, classes * label_probs)
        return parameters

    @torch.no_grad()
    def count_matrices(self, parameters: Parameters) -> Parameters:
        """Estimate T and pi from the most probable class of each sample, as if the votes were certain."""
        fused = class_probs(parameters, self.votes).fused
        predicted = torch.zeros_like(fused).scatter_(-1, fused.argmax(-1, keepdim=True), 1.0)
        return self._update_matrices(parameters, predicted)

    def _update_matrices(self, parameters: Parameters, classes: Tensor) -> Parameters:
        """Estimate T and pi from class probabilities given the labels [G, n, C]; each fold gets those of the other."""
        rates, num_classes = parameters.noise.rates, self.num_classes
        classes = classes / classes.sum(-1, keepdim=True) * self.weights[:, None]
        matrices, frequencies = [], torch.zeros_like(parameters.frequencies)
        for fold in (0, 1):
            rows = self.fold != fold
            counts = torch.zeros(len(rates), num_classes, num_classes, device=rates.device).index_add_(
                1, self.labels[rows], classes[:, rows]
            )
            counts = counts.transpose(1, 2)
            totals, correct = counts.sum(2), counts.diagonal(dim1=1, dim2=2)
            prior = (totals + 1) / (totals + 1).sum(1, keepdim=True)
            wrong = (totals - correct + MATRIX_PRIOR * rates[:, None]) / (totals + MATRIX_PRIOR)
            # Only the ratios of the classes are estimated; the mean rate is that of the grid.
            wrong = (wrong * (rates / (wrong * prior).sum(1).clamp_min(1e-6))[:, None]).clamp(0, 0.999)
            uniform = (1 - torch.eye(num_classes, device=rates.device)) / (num_classes - 1)
            errors = counts - torch.diag_embed(correct)
            errors = errors + (MATRIX_PRIOR * rates).clamp_min(MIN_ERROR_PRIOR)[:, None, None] * uniform
            errors = errors / errors.sum(2, keepdim=True)
            matrices.append(torch.diag_embed(1 - wrong) + wrong[..., None] * errors)
            frequencies = frequencies + prior / 2
        return replace(parameters, frequencies=frequencies, noise=LabelNoise(rates, torch.stack(matrices, 1)))

    def sharpness(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """Return the entropy and the certainty of the label owner's class probabilities: [G] each; see `Profile`."""
        probs = class_probs(parameters, self.votes)
        owner = held_out(parameters, probs, self.votes.paired)
        entropy = -(owner * owner.clamp_min(1e-12).log()).sum(-1)
        largest, predicted = owner.max(-1)
        certainty = []
        for values, classes in zip(largest, predicted, strict=True):
            tops = [values[classes == label].sort(descending=True).values for label in range(self.num_classes)]
            certainty.append(torch.stack([top[: max(1, len(top) // 10)].mean() for top in tops if len(top)]).mean())
        return (entropy * self.weights).double().sum(1), torch.stack(certainty)


def held_out(parameters: Parameters, probs: ClassProbs, paired: Tensor) -> Tensor:
    """Return the class probabilities of the label's owner without the label: [G, n, C]."""
    matched = (1 - parameters.mismatch) * probs.ratio
    matched = torch.where(paired, matched / (matched + parameters.mismatch), 1.0)[..., None]
    owner = parameters.visual_owner[..., None]
    return matched * probs.fused + (1 - matched) * (owner * probs.visual + (1 - owner) * probs.audio)
