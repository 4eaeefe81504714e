"""Result of a label correction. Legend: N samples, n samples of this rank, C classes, R candidate rates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distav.distributed.collectives import local_shard
from distav.noise.class_posterior import corrected_labels
from distav.noise.noise_rate import RateEstimate, candidate_rates, class_rates, unknown_rate

MODALITY_DTYPE = torch.float16
"""Type of the class probabilities of the modalities. They are the targets of classifiers; the probabilities of the
label's owner, by which labels are changed and ranked, are float32."""


@dataclass(frozen=True)
class CorrectionPrior:
    """Results of earlier corrections that a later one uses.

    The features of later rounds are trained on votes that depend slightly on every label. The rates of the first
    correction are therefore the most reliable.

    Attributes:
        held_out: [n, C] held-out probabilities of the previous correction, one of the votes.
        rate_log_likelihood, pair_rate_log_likelihood, visual_owner: of the first correction; see `Correction`.
    """

    held_out: Tensor
    rate_log_likelihood: Tensor
    pair_rate_log_likelihood: Tensor
    visual_owner: float


@dataclass(frozen=True)
class Correction:
    """Corrected labels of this rank's samples, and the noise estimates.

    The label of a mismatched pair names the class of one of its modalities, its owner.

    Attributes:
        held_out: [n, C] probabilities of the class of the label's owner that do not depend on the sample's own label;
            the given label where there are no votes or no signal.
        posterior: [n, C] the same probabilities that also depend on the sample's own label, by the noise model.
        visual_held_out, visual_posterior: [n, C] the same for the class of the frames, of type `MODALITY_DTYPE`.
        audio_held_out, audio_posterior: [n, C] the same for the class of the audio.
        correspondence: [n] probability that audio and frames show the same class; 1 for samples with one modality.
        rate_log_likelihood, pair_rate_log_likelihood: [R] log-likelihoods of the label-noise rates and of the mismatch
            rates, the priors of later corrections.
        label_rate: label-noise rate.
        transition_matrix: [C, C + 1] P(given | true), and the estimated number of samples of each class in the last
            column.
        pair_rate: mismatch rate of the pairs.
        visual_owner: fraction of the mismatched pairs whose label names the class of the frames.
        log_likelihood_gain: gain of the votes over the class frequencies in predicting the given labels, in nats.
        has_signal: whether the gain exceeds `min_log_likelihood_gain`.
        selected_votes: configuration of each vote.
        caution: factor on the odds from which on a label is changed, more than 1 if label noise and mismatched pairs
            cannot be distinguished; see `cautious_odds_factor`.
    """

    held_out: Tensor
    posterior: Tensor
    visual_held_out: Tensor
    visual_posterior: Tensor
    audio_held_out: Tensor
    audio_posterior: Tensor
    correspondence: Tensor
    rate_log_likelihood: Tensor
    pair_rate_log_likelihood: Tensor
    label_rate: RateEstimate
    transition_matrix: Tensor
    pair_rate: RateEstimate
    visual_owner: float
    log_likelihood_gain: float
    has_signal: bool
    selected_votes: dict[str, str]
    caution: float = 1.0

    @property
    def class_rates(self) -> list[RateEstimate]:
        """Label-noise rate of each class."""
        return class_rates(self.transition_matrix, self.label_rate)

    def corrected_labels(self, given: Tensor, min_odds: float) -> Tensor:
        """Return the labels after correction: [n] -> [n] int64.

        Args:
            given: [n] int64 labels of this rank.
            min_odds: how many times as probable as the given label another one must be to replace it, times `caution`.
        """
        return corrected_labels(self.posterior, given, min_odds * self.caution)


def identity_correction(given: Tensor, num_classes: int) -> Correction:
    """Return the correction that leaves labels and pairs unchanged and does not estimate the noise.

    Args:
        given: [N] int64 labels.
        num_classes: C.
    """
    labels = local_shard(given)
    probs = torch.zeros(len(labels), num_classes, device=given.device).scatter_(1, labels[:, None], 1.0)
    log_likelihood = torch.zeros_like(candidate_rates(num_classes), device=given.device)
    rate = unknown_rate(num_classes)
    return Correction(
        held_out=probs,
        posterior=probs.clone(),
        visual_held_out=probs.to(MODALITY_DTYPE),
        visual_posterior=probs.to(MODALITY_DTYPE),
        audio_held_out=probs.to(MODALITY_DTYPE),
        audio_posterior=probs.to(MODALITY_DTYPE),
        correspondence=torch.ones_like(probs[:, 0]),
        rate_log_likelihood=log_likelihood,
        pair_rate_log_likelihood=log_likelihood,
        label_rate=rate,
        transition_matrix=probs.new_zeros(num_classes, num_classes + 1),
        pair_rate=rate,
        visual_owner=1.0,
        log_likelihood_gain=0.0,
        has_signal=False,
        selected_votes={},
    )
