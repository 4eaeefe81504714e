"""The votes of a label correction and their combination; `correct_labels` describes the members of the ensemble.

Legend: n samples of this rank, t samples of a tile, C classes, R noise rates, M members of the ensemble.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows
from distav.noise.audio_search import AudioVote, select_audio_vote
from distav.noise.calibration import Calibration
from distav.noise.class_agreement import gate_by_correspondence, reconcile_pair_rate
from distav.noise.noise_rate import RateEstimate, estimate_rate, estimate_transition_matrix
from distav.noise.probabilities import SMALLEST, normalize_rows
from distav.noise.tiling import map_tiles
from distav.noise.vote_search import FeatureSpace, SelectedVote, VoteTask, joint_features, select_label_vote


@dataclass(frozen=True)
class CorrectionPrior:
    """Results of earlier corrections that a later one uses.

    The features of later rounds are trained on votes that depend slightly on every label. The noise rate of the first
    correction is therefore the most reliable, and later intervals are at least as wide.

    Attributes:
        held_out: [n, C] held-out probabilities of the previous correction, a member of the ensemble.
        rate_log_likelihood, rate_log_likelihood_credible: [R] of the first correction; see `Correction`.
    """

    held_out: Tensor
    rate_log_likelihood: Tensor
    rate_log_likelihood_credible: Tensor


@dataclass(frozen=True)
class EnsembleSummary:
    """Results of the votes besides the combined probabilities; it does not hold the tables of the members.

    Attributes:
        audio_probs: [n, C] calibrated class probabilities of the audio.
        correspondence: [n] probability that audio and frames show the same class.
        pair_rate: mismatch rate of the pairs.
        per_sample: largest log-likelihood of a vote, in nats per sample.
        rate_log_likelihood: [R] log-likelihood of the noise rate from the vote with the narrowest interval.
        rate_log_likelihood_credible: [R] the same over its credible configurations.
        selected_votes: configuration of each vote, and the weights of the ensemble.
    """

    audio_probs: Tensor
    correspondence: Tensor
    pair_rate: RateEstimate
    per_sample: float
    rate_log_likelihood: Tensor
    rate_log_likelihood_credible: Tensor
    selected_votes: dict[str, str]


def vote_ensemble(
    task: VoteTask,
    spaces: Sequence[FeatureSpace],
    prior: CorrectionPrior | None,
    teachers: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, EnsembleSummary]:
    """Return the combined class probabilities [n, C] of all votes; see `correct_labels` for the arguments.

    At most M + 2 tables [n, C] are held: the members, the class probabilities of the audio and one result.
    """
    num_classes, rate_prior = task.num_classes, prior.rate_log_likelihood if prior else None
    visual = visual_vote(task, spaces, rate_prior)
    visual_rate = estimate_rate(visual.calibration.rate_log_likelihood, num_classes).estimate
    audio = audio_vote(task, spaces, visual, teachers[1] if teachers else None)
    cross_modal = cross_modal_vote(task, spaces, audio.probs, rate_prior)
    joint = joint_vote(task, spaces, audio.correspondence, rate_prior)
    members = {
        "fused": map_tiles(num_classes, fuse, visual.probs, audio.probs, audio.correspondence),
        "joint": joint.probs,
        "visual": visual.probs,
        "cross_modal": cross_modal.probs,
    }
    votes = [visual, joint]
    if prior:
        members["previous"] = prior.held_out
    if teachers:
        visual_teacher, audio_teacher = teacher_votes(task, teachers, audio.correspondence, rate_prior)
        members |= {"visual_teacher": visual_teacher.probs, "audio_teacher": audio_teacher.probs}
        votes += [visual_teacher, audio_teacher]
    combined, weights = combine(task, members, visual.calibration, visual_rate if prior else None)
    narrowest = min(votes, key=lambda vote: estimate_rate(vote.calibration.rate_log_likelihood, num_classes).ci95_width)
    return combined, EnsembleSummary(
        audio_probs=audio.probs,
        correspondence=audio.correspondence,
        pair_rate=_pair_rate(visual.calibration, audio, num_classes),
        per_sample=max(vote.calibration.per_sample for vote in votes),
        rate_log_likelihood=narrowest.calibration.rate_log_likelihood,
        rate_log_likelihood_credible=narrowest.rate_log_likelihood_credible,
        selected_votes={
            "visual": visual.name,
            "audio": audio.name,
            "joint": joint.name,
            "cross_modal": cross_modal.name,
            "ensemble": ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()),
        },
    )


def visual_vote(task: VoteTask, spaces: Sequence[FeatureSpace], rate_prior: Tensor | None) -> SelectedVote:
    """Return the vote of the visual neighbors with the given labels."""
    return select_label_vote(task.restricted("visual"), spaces, lambda space: space.visual, rate_prior)


def audio_vote(
    task: VoteTask, spaces: Sequence[FeatureSpace], visual: SelectedVote, teacher: Tensor | None
) -> AudioVote:
    """Return the vote of the audio neighbors with the classes of the frames, given the visual vote and the labels."""
    calibration = visual.calibration
    rate = estimate_rate(calibration.rate_log_likelihood, task.num_classes).estimate
    visual_posterior, _ = estimate_transition_matrix(
        visual.probs, task.local_labels, rate, calibration.error_distribution
    )
    return select_audio_vote(task, spaces, visual_posterior, teacher)


def cross_modal_vote(
    task: VoteTask, spaces: Sequence[FeatureSpace], audio_probs: Tensor, rate_prior: Tensor | None
) -> SelectedVote:
    """Return the vote of the visual neighbors with the classes of their audio."""
    audio_labels = audio_probs.argmax(1)
    task = replace(task.restricted("visual"), labels=all_gather_variable_rows(audio_labels), local_labels=audio_labels)
    return select_label_vote(task, spaces, lambda space: space.visual, rate_prior)


def joint_vote(
    task: VoteTask, spaces: Sequence[FeatureSpace], correspondence: Tensor, rate_prior: Tensor | None
) -> SelectedVote:
    """Return the vote of the neighbors in the concatenated features with the given labels."""
    return select_label_vote(task, spaces, partial(joint_features, task, correspondence), rate_prior)


def teacher_votes(
    task: VoteTask, teachers: tuple[Tensor, Tensor], correspondence: Tensor, rate_prior: Tensor | None
) -> tuple[SelectedVote, SelectedVote]:
    """Return the calibrated probabilities of the visual and audio teachers, the latter gated by the correspondence."""

    def calibrated(name: str, probs: Tensor) -> SelectedVote:
        calibration = task.calibrator.calibrate(probs, rate_prior)
        return SelectedVote(name, calibration.calibrate(probs), calibration, calibration.rate_log_likelihood)

    visual, audio = calibrated("visual_teacher", teachers[0]), calibrated("audio_teacher", teachers[1])
    return visual, replace(audio, probs=map_tiles(task.num_classes, _gate, audio.probs, correspondence))


def combine(
    task: VoteTask, members: Mapping[str, Tensor], calibration: Calibration, rate: float | None
) -> tuple[Tensor, dict[str, float]]:
    """Combine class probabilities as a weighted product; see `VoteCalibrator.fit_ensemble`.

    Args:
        task: the task with the calibrator.
        members: [n, C] calibrated class probabilities by name.
        calibration: fit of the visual vote, whose distribution of the label errors is used.
        rate: noise rate; None averages over the candidate rates.

    Returns:
        [n, C] combined probabilities, and the weights by name.
    """
    combined, weights = task.calibrator.fit_ensemble(list(members.values()), calibration.error_distribution, rate)
    return combined, dict(zip(members, weights, strict=True))


def fuse(probs: Tensor, other: Tensor, correspondence: Tensor) -> Tensor:
    """Return the product of the class probabilities of two modalities, the second gated: [t, C], [t, C], [t]."""
    return normalize_rows((probs * gate_by_correspondence(other, correspondence)).clamp_min_(SMALLEST))


def _gate(probs: Tensor, correspondence: Tensor) -> Tensor:
    """Return class probabilities from the other modality, uniform where the correspondence is 0: [t, C], [t]."""
    return normalize_rows(gate_by_correspondence(probs, correspondence))


def _pair_rate(visual: Calibration, audio: AudioVote, num_classes: int) -> RateEstimate:
    """Return the mismatch rate, reconciled with the noise rates given each modality if label noise is symmetric."""
    if visual.is_asymmetric:
        return audio.mismatch_rate
    return reconcile_pair_rate(audio.mismatch_rate, visual.rate_log_likelihood, audio.rate_log_likelihood, num_classes)
