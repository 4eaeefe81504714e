"""Label correction with a calibrated ensemble of held-out k-NN votes.

Every choice (features, whitening, number of neighbors, temperature, voting rounds, modality) maximizes the likelihood
of the given labels under held-out votes (`distav.noise.calibration`); true labels are never used.
Legend: N samples, n samples of this rank, t samples of a tile, C classes, E feature width, R noise rates, M members of
the ensemble.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distav.distributed.collectives import local_shard
from distav.noise.calibration import VoteCalibrator
from distav.noise.noise_rate import (
    RateEstimate,
    candidate_rates,
    class_rates,
    estimate_rate,
    estimate_transition_matrix,
)
from distav.noise.tiling import map_tiles
from distav.noise.vote_ensemble import CorrectionPrior, fuse, vote_ensemble
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace, VoteTask


@dataclass(frozen=True)
class Correction:
    """Corrected labels of this rank's samples, and the noise estimates.

    Attributes:
        held_out: [n, C] class probabilities that do not depend on the sample's own label; the given label where there
            are no votes or no signal.
        posterior: [n, C] class probabilities that also depend on the sample's own label, by the noise model.
        audio_held_out, audio_posterior: [n, C] the same for the class of the audio, which differs in a mismatched pair.
        correspondence: [n] probability that audio and frames show the same class; 1 for samples with one modality.
        rate_log_likelihood: [R] log-likelihood of the noise rates, the prior of later corrections.
        rate_log_likelihood_credible: [R] the same over all configurations that predict the labels about as well, for
            the interval of the noise rate.
        label_rate: label-noise rate.
        transition_matrix: [C, C + 1] P(given | true), and the estimated number of samples of each class in the last
            column.
        pair_rate: mismatch rate of the pairs.
        log_likelihood_gain: gain of the best vote over the class frequencies in predicting the given labels, in nats.
        has_signal: whether the gain exceeds `min_log_likelihood_gain`.
        selected_votes: configuration of each vote, and the weights of the ensemble.
    """

    held_out: Tensor
    posterior: Tensor
    audio_held_out: Tensor
    audio_posterior: Tensor
    correspondence: Tensor
    rate_log_likelihood: Tensor
    rate_log_likelihood_credible: Tensor
    label_rate: RateEstimate
    transition_matrix: Tensor
    pair_rate: RateEstimate
    log_likelihood_gain: float
    has_signal: bool
    selected_votes: dict[str, str]

    @property
    def class_rates(self) -> list[RateEstimate]:
        """Label-noise rate of each class."""
        return class_rates(self.transition_matrix, self.label_rate)


def correct_labels(
    spaces: Sequence[FeatureSpace],
    given: Tensor,
    num_classes: int,
    groups: Tensor,
    has_modality: Mapping[str, Tensor],
    search_space: VoteSearchSpace,
    prior: CorrectionPrior | None = None,
    teachers: tuple[Tensor, Tensor] | None = None,
) -> Correction:
    """Correct labels with a calibrated ensemble of held-out k-NN votes.

    The ensemble has these members:

    - ``visual``: visual neighbors vote with the given labels.
    - ``fused``: the visual vote times the audio vote, gated by the correspondence probability. Audio neighbors vote
      with the classes of the visual vote, so that the audio gets a class of its own.
    - ``cross_modal``: visual neighbors vote with the audio classes. Corrects visual clusters in which wrong labels form
      a majority.
    - ``joint``: neighbors in the concatenated space vote with the given labels; audio is scaled by the correspondence
      probability.
    - ``previous``, ``visual_teacher``, ``audio_teacher``: the previous correction and the teachers, where given.

    Members are calibrated on the given labels and combined as a weighted product; the weights are averaged over their
    likelihood. If the votes predict the given labels no better than class frequencies do
    (``min_log_likelihood_gain``), the labels are returned unchanged.

    At most M + 2 tables [n, C] float32 are held at a time, in addition to the arguments.

    Args:
        spaces: features of this rank's samples, `shard_range(N)`.
        given: [N] int64 labels.
        num_classes: C.
        groups: [N] int64; samples of one group do not vote for each other.
        has_modality: [N] bool by modality, samples that have its features. Samples without any do not vote and keep
            their label; those with features of one modality vote in that modality and in the concatenated space.
        search_space: configurations of the votes.
        prior: results of earlier corrections.
        teachers: class probabilities [n, C] of frames and audio from networks that were trained without the labels:
            two members of the ensemble, and another candidate for the audio vote.
    """
    valid = torch.stack(list(has_modality.values())).any(0)
    local_labels, present = local_shard(given), local_shard(valid)
    search_space = feasible_search_space(search_space, len(given), num_classes)
    calibrator = VoteCalibrator(local_labels, num_classes, present)
    task = VoteTask(given, local_labels, num_classes, groups, valid, present, has_modality, search_space, calibrator)
    combined, ensemble = vote_ensemble(task, spaces, prior, teachers)

    calibration = calibrator.calibrate(combined, (prior or ensemble).rate_log_likelihood)
    held_out = calibration.calibrate(combined)
    del combined
    credible = (prior or ensemble).rate_log_likelihood_credible
    label_rate = estimate_rate(calibration.rate_log_likelihood, num_classes).spanning(
        estimate_rate(credible, num_classes)
    )
    posterior, matrix = estimate_transition_matrix(
        held_out, local_labels, label_rate.estimate, calibration.error_distribution
    )
    correspondence = ensemble.correspondence
    audio_held_out = map_tiles(num_classes, fuse, ensemble.audio_probs, held_out, correspondence)
    audio_posterior = map_tiles(num_classes, fuse, ensemble.audio_probs, posterior, correspondence)
    gain = (ensemble.per_sample - calibrator.prior_log_likelihood()) * calibration.num_samples
    has_signal = gain > search_space.min_log_likelihood_gain
    corrected = present if has_signal else torch.zeros_like(present)
    for probs in (held_out, posterior, audio_held_out, audio_posterior):
        _restore_labels(probs, local_labels, ~corrected)
    return Correction(
        held_out=held_out,
        posterior=posterior,
        audio_held_out=audio_held_out,
        audio_posterior=audio_posterior,
        correspondence=torch.where(corrected, correspondence, torch.ones_like(correspondence)),
        rate_log_likelihood=calibration.rate_log_likelihood,
        rate_log_likelihood_credible=credible,
        label_rate=label_rate,
        transition_matrix=matrix,
        pair_rate=ensemble.pair_rate,
        log_likelihood_gain=gain,
        has_signal=has_signal,
        selected_votes=ensemble.selected_votes,
    )


def feasible_search_space(search_space: VoteSearchSpace, num_samples: int, num_classes: int) -> VoteSearchSpace:
    """Return the search space restricted to numbers of neighbors that the dataset has."""
    num_neighbors = feasible_num_neighbors(search_space.num_neighbors, num_samples, num_classes)
    second_round = [k for k in search_space.second_round_neighbors if k <= max(num_neighbors)]
    return replace(search_space, num_neighbors=num_neighbors, second_round_neighbors=second_round or [0])


def feasible_num_neighbors(num_neighbors: Sequence[int], num_samples: int, num_classes: int) -> list[int]:
    """Return the numbers of neighbors below the number of samples; for small datasets, smaller ones are added.

    The smallest is halved until it is at most half the average class size, because more neighbors belong to other
    classes.
    """
    feasible = [k for k in num_neighbors if k < num_samples]
    while feasible and min(feasible) > max(2, num_samples / (2 * num_classes)):
        feasible.insert(0, min(feasible) // 2)
    return feasible


def identity_correction(given: Tensor, num_classes: int) -> Correction:
    """Return the correction that leaves labels and pairs unchanged and does not estimate the noise.

    Args:
        given: [N] int64 labels.
        num_classes: C.
    """
    labels = local_shard(given)
    probs = torch.zeros(len(labels), num_classes, device=given.device).scatter_(1, labels[:, None], 1.0)
    log_likelihood = torch.zeros_like(candidate_rates(num_classes), device=given.device)
    rate = estimate_rate(log_likelihood, num_classes)
    return Correction(
        held_out=probs,
        posterior=probs.clone(),
        audio_held_out=probs.clone(),
        audio_posterior=probs.clone(),
        correspondence=torch.ones_like(probs[:, 0]),
        rate_log_likelihood=log_likelihood,
        rate_log_likelihood_credible=log_likelihood,
        label_rate=rate,
        transition_matrix=probs.new_zeros(num_classes, num_classes + 1),
        pair_rate=rate,
        log_likelihood_gain=0.0,
        has_signal=False,
        selected_votes={},
    )


def _restore_labels(probs: Tensor, labels: Tensor, restored: Tensor) -> None:
    """Set the probabilities of selected samples to their given labels, in place: [n, C], [n], [n] bool."""
    rows = restored.nonzero().squeeze(1)
    probs[rows] = 0.0
    probs[rows, labels[rows]] = 1.0
