"""Composite likelihood of the given labels under the model of `distav.noise.vote_model`.

    sum_i log P(y_i | V_i, A_i) + (log P(y_i | V_i) + log P(y_i | A_i)) / 2

plus weak priors of the inverse temperatures. The agreement of the two modalities determines only the mismatch rate, by
expectation-maximization: without a label signal it must not make votes look informative. The inverse temperatures of
the votes of the halves maximize the likelihood of the labels under each modality alone.

Under asymmetric noise T is estimated by expectation-maximization in two folds of the samples; each fold uses the T of
the other, so that the free parameters of T gain no likelihood by chance.
Legend: n samples, C classes, G noise rates, F = 2 folds, S parameters of the votes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.noise.model_parameters import LabelNoise, Parameters, Votes
from distav.noise.vote_model import (
    MAX_EPSILON,
    agreement_ratios,
    class_probs,
    half_probs,
    held_out_probs,
    label_likelihood,
    match_probability,
    pair_ratios,
)
from distav.noise.vote_products import AUDIO, FUSED, VISUAL, exponents, product_likelihoods

SINGLE_WEIGHT = 0.5
"""Weight of the likelihood of each single modality in the composite likelihood."""
MATRIX_PRIOR = 20.0
"""Weight of symmetric noise in an estimated transition matrix, in samples per class."""
MIN_ERROR_PRIOR = 5.0
"""Smallest weight of symmetric noise in the distribution of the wrong labels of a class, in samples."""
ITERATIONS, SYMMETRIC_ITERATIONS = 4, 40
"""Iterations of expectation-maximization; under symmetric noise the likelihoods do not change, and they are cheap."""
HALF_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Factors by which an update may change the inverse temperatures of the votes of the halves."""
MIN_HALF_SCALE, MAX_HALF_SCALE = 0.02, 10.0
"""Their range; at the smallest, the votes of a modality say nothing."""
BISECTIONS = 30


@dataclass(frozen=True)
class Evidence:
    """What does not change while the inverse temperatures are fitted.

    Attributes:
        label_probs: [G, C, n] P(y_i | c); None for symmetric noise.
        ratios: [R, G, n] r of the pairs.
    """

    label_probs: Tensor | None
    ratios: Tensor


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
        self.votes, self.labels, self.num_classes, self.weights = (
            votes.with_samples_last(),
            labels,
            num_classes,
            weights,
        )
        roles = (self.votes.visual, self.votes.audio, self.votes.joint)
        self.tables = torch.stack([table.t() for tables in roles for table in tables])
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

    def evidence(self, parameters: Parameters) -> Evidence:
        """Return the evidence for `objective`."""
        label_probs = parameters.noise.probabilities(self.labels, self.fold)
        return Evidence(label_probs, agreement_ratios(parameters, self.votes))

    def pair_objective(self, parameters: Parameters, evidence: Evidence) -> Tensor:
        """Return the objective with the log-likelihood of the agreement of both modalities: [G] float64."""
        mismatch, paired = parameters.mismatch, self.votes.paired
        agreement = ((1 - mismatch) * evidence.ratios + mismatch).log().mean(0) * paired
        return self.objective(parameters, evidence) + (agreement * self.weights).double().sum(1)

    def objective(self, parameters: Parameters, evidence: Evidence) -> Tensor:
        """Return the composite log-likelihood plus the logarithm of the priors: [G] float64."""
        likelihoods = self._likelihoods(parameters, evidence.label_probs)
        visual, audio, fused, *of_owner = likelihoods.unbind(1)
        owner_if_visual, owner_if_audio = of_owner or (visual, audio)
        matched = match_probability(parameters.mismatch, evidence.ratios, self.votes.paired)
        owner = parameters.visual_owner
        mismatched = owner * owner_if_visual + (1 - owner) * owner_if_audio
        total = (matched * fused + (1 - matched) * mismatched).clamp_min(1e-12).log()
        for role, known in enumerate((visual, audio)):
            total = total + SINGLE_WEIGHT * self._single_log_likelihood(parameters, known, role)
        deviations = (parameters.votes - self.prior_mean) / self.prior_deviation
        return (total * self.weights).double().sum(1) - 0.5 * deviations.double().square().sum(1)

    def _likelihoods(self, parameters: Parameters, label_probs: Tensor | None) -> Tensor:
        """Return L of each product of votes, mixed with the class frequencies: [G, P, n].

        That of a missing modality has no meaning; the objective does not use it.
        """
        likelihoods = product_likelihoods(exponents(parameters, self.votes), self.tables, self.labels, label_probs)
        if label_probs is None:
            likelihoods = parameters.noise.symmetric_likelihood(likelihoods, self.num_classes)
        roles = [VISUAL, AUDIO] + [FUSED] * (likelihoods.shape[1] - 2)
        weights = MAX_EPSILON * parameters.votes[:, -3:].sigmoid()[:, roles, None]
        return (1 - weights) * likelihoods + weights * self._chance(parameters)[:, None]

    def _single_log_likelihood(self, parameters: Parameters, known: Tensor, role: int) -> Tensor:
        """Return log P(y | votes of one modality), 0 for samples without it: [G, n].

        Args:
            parameters: parameters of the model.
            known: [G, n] L of the modality.
            role: 0 for the visual, 1 for the audio modality.
        """
        owner = parameters.visual_owner
        unknown = torch.where(self.votes.paired, parameters.mismatch, 0.0) * (owner if role else 1 - owner)
        likelihood = (1 - unknown) * known + unknown * self._chance(parameters)
        return likelihood.clamp_min(1e-12).log() * (self.votes.has_audio if role else self.votes.has_visual)

    def _chance(self, parameters: Parameters) -> Tensor:
        """Return P(y) of the labels, without votes: [G, n]."""
        frequencies, matrices = parameters.frequencies, parameters.noise.matrices
        if matrices is None:
            return parameters.noise.symmetric_likelihood(frequencies[:, self.labels], self.num_classes)
        return torch.einsum("gc,gfcy->gfy", frequencies, matrices)[:, self.fold, self.labels]

    @torch.no_grad()
    def maximize(self, parameters: Parameters, fits_mismatch: bool) -> Parameters:
        """Update the inverse temperatures of the halves, m if it is fitted, and under asymmetric noise T and pi.

        All but the first are updated by expectation-maximization.
        """
        parameters = self._update_half_scales(parameters)
        label_probs, paired = parameters.noise.probabilities(self.labels, self.fold), self.votes.paired
        if label_probs is None and not fits_mismatch:
            return parameters
        probs = class_probs(parameters, self.votes, agreement_ratios(parameters, self.votes))
        likelihood = label_likelihood(parameters, probs, self.labels, label_probs, paired)
        for _ in range(SYMMETRIC_ITERATIONS if label_probs is None else ITERATIONS):
            mismatch, owner = parameters.mismatch, parameters.visual_owner
            matched = (1 - mismatch) * probs.ratios * likelihood.fused
            visual = mismatch * owner * likelihood.visual
            audio = mismatch * (1 - owner) * likelihood.audio
            total = matched + visual + audio
            matched, visual, audio = (
                torch.where(paired, (part / total).mean(0), fill)
                for part, fill in zip((matched, visual, audio), (1.0, 0.0, 0.0), strict=True)
            )
            if fits_mismatch:
                weights = self.weights * paired
                mismatched = ((visual + audio) * weights).sum(1, keepdim=True)
                parameters = replace(parameters, mismatch=((mismatched + 1) / (weights.sum() + 4)).clamp(1e-4, 0.97))
            if label_probs is not None:
                shares = [matched / likelihood.fused, visual / likelihood.visual, audio / likelihood.audio]
                classes = sum(
                    share[:, None] * table
                    for share, table in zip(
                        shares, (probs.fused, probs.owner_if_visual, probs.owner_if_audio), strict=True
                    )
                )
                parameters = self._update_matrices(parameters, classes * label_probs)
                label_probs = parameters.noise.probabilities(self.labels, self.fold)
                likelihood = label_likelihood(parameters, probs, self.labels, label_probs, paired)
        return parameters

    def _update_half_scales(self, parameters: Parameters) -> Parameters:
        """Search better inverse temperatures of the votes of the halves near the present ones."""
        scales = []
        for role, halves in enumerate((self.votes.visual_halves, self.votes.audio_halves)):
            current = parameters.half_scales[:, role]
            if halves:
                factors = torch.tensor(HALF_FACTORS, device=current.device)
                candidates = (current * factors[:, None]).clamp(MIN_HALF_SCALE, MAX_HALF_SCALE)
                candidates = torch.cat([candidates, torch.full_like(candidates[:1], MIN_HALF_SCALE)])
                label_probs = parameters.noise.probabilities(self.labels, self.fold)
                scores = [self._half_score(parameters, scale, halves, role, label_probs) for scale in candidates]
                current = candidates.gather(0, torch.stack(scores).argmax(0)[None]).squeeze(0)
            scales.append(current)
        return replace(parameters, half_scales=torch.stack(scales, 1))

    def _half_score(
        self, parameters: Parameters, scale: Tensor, halves: Sequence[Tensor], role: int, label_probs: Tensor | None
    ) -> Tensor:
        """Return the log-likelihood of the labels given the votes of the halves of one modality: [G] float64."""
        known = [parameters.noise.likelihood(half_probs(scale, table), self.labels, label_probs) for table in halves]
        logs = [self._single_log_likelihood(parameters, part, role) for part in known]
        return (torch.stack(logs).sum(0) * self.weights).double().sum(1)

    def without_joint_votes(self) -> "CompositeLikelihood":
        """Return the likelihood of the same samples without the joint votes."""
        votes = replace(self.votes, joint=[])
        return CompositeLikelihood(votes, self.labels, self.num_classes, self.weights)

    @torch.no_grad()
    def match_calibrated(self, parameters: Parameters) -> Parameters:
        """Return the parameters with the m at which z of the whole votes has the mean 1 - m of the given parameters.

        The votes of the halves estimate the mismatch rate; those of all voters decide which pairs match.
        """
        paired, mismatch = self.votes.paired, parameters.mismatch
        if not bool(paired.any()):
            return parameters
        ratios = pair_ratios(parameters, self.votes)[..., paired]
        weights = self.weights[paired] / self.weights[paired].sum()
        low, high = torch.full_like(mismatch, 1e-6), torch.full_like(mismatch, 1 - 1e-6)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            matches = (match_probability(middle, ratios, paired[paired]) * weights).sum(1, keepdim=True)
            too_small = matches > 1 - mismatch
            low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
        return replace(parameters, mismatch=(low + high) / 2)

    @torch.no_grad()
    def count_matrices(self, parameters: Parameters) -> Parameters:
        """Estimate T and pi from the most probable class of each sample, as if the votes were certain."""
        fused = class_probs(parameters, self.votes).fused
        predicted = torch.zeros_like(fused).scatter_(1, fused.argmax(1, keepdim=True), 1.0)
        return self._update_matrices(parameters, predicted)

    def _update_matrices(self, parameters: Parameters, classes: Tensor) -> Parameters:
        """Estimate T and pi from class probabilities given the labels [G, C, n]; each fold gets those of the other."""
        rates, num_classes = parameters.noise.rates, self.num_classes
        classes = classes / classes.sum(1, keepdim=True) * self.weights
        by_label = torch.nn.functional.one_hot(self.labels, num_classes).to(classes.dtype)
        matrices, frequencies = [], torch.zeros_like(parameters.frequencies)
        for fold in (0, 1):
            counts = classes @ (by_label * (self.fold != fold)[:, None])
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

    def entropy(self, parameters: Parameters) -> Tensor:
        """Return the entropy of the label owner's class probabilities, in nats: [G] float64; see `Profile`."""
        probs = class_probs(parameters, self.votes, agreement_ratios(parameters, self.votes))
        owner = held_out_probs(parameters, probs, self.votes.paired)
        entropy = -(owner * owner.clamp_min(1e-12).log()).sum(1)
        return (entropy * self.weights).double().sum(1)
