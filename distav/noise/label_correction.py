"""Label correction: what a sample's neighbours say that it shows, and how far to believe them.

Every choice (features, whitening, neighbours, temperature, one vote or two, one modality or both) is made by how well
held-out votes foretell the given labels (`distav.noise.calibration`); true labels are never asked.
Legend: N samples, n samples of this rank, C classes, E feature width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, local_shard
from distav.noise.calibration import VoteCalibrator
from distav.noise.class_agreement import gate_by_correspondence, reconcile_pair_rate
from distav.noise.noise_rate import RateEstimate, class_rates, estimate_rate, estimate_transition_matrix, rates
from distav.noise.tiling import in_tiles, normalized
from distav.noise.vote_search import (
    FeatureSpace,
    VoteSearchSpace,
    VoteTask,
    joint_features,
    select_audio_vote,
    select_label_vote,
)


@dataclass(frozen=True)
class CorrectionPrior:
    """What earlier corrections leave to a later one.

    Later features were trained on votes that every label had a small part in, so of the noise rate the first correction
    knows best, and none is surer than it was.

    Attributes:
        held_out: [n, C] what the last one held out, one more voice.
        evidence, told: [R] of the first; see `Correction`.
    """

    held_out: Tensor
    rate_log_likelihood: Tensor
    rate_log_likelihood_credible: Tensor


@dataclass(frozen=True)
class Correction:
    """What the votes say of this rank's samples.

    Attributes:
        held_out: [n, C] class shares in which the sample's own label had no part; where votes know nothing, the label.
        posterior: [n, C] with the own label weighed by how often labels are wrong.
        audio_held_out, audio_posterior: [n, C] the same for the class of the sound, its own where a pair is mismatched.
        correspondence: [n] probability that sound and picture show one class.
        evidence: [R] log-likelihood of the noise rates, the prior of a correction to come.
        told: [R] the same over all ways to vote that do about as well, which tells how sure a rate is.
        label_rate: share of wrong labels.
        noise_matrix: [C, C + 1] how each class is labelled, P(given | true), and in the last column its samples.
        pair_rate: share of mismatched pairs.
        nats: by how much the votes make the labels likelier than their frequencies do.
        has_signal: whether that is enough to believe them.
        chosen: the votes that won, by what they vote on, with weights.
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
        """Share of wrong labels of each class."""
        return class_rates(self.transition_matrix, self.label_rate)


def correct_labels(
    spaces: Sequence[FeatureSpace],
    given: Tensor,
    num_classes: int,
    groups: Tensor,
    valid: Tensor,
    search_space: VoteSearchSpace,
    prior: CorrectionPrior | None = None,
    teachers: tuple[Tensor, Tensor] | None = None,
) -> Correction:
    """Vote on the class of each sample among its neighbours in feature space.

    Pictures vote among pictures on the given labels. Sounds vote among sounds on what their pictures were found to
    show, so that each sound gets a class of its own; how far both agree tells mismatched pairs. Pictures vote again, on
    what the sounds of their neighbours were found to be: a group of pictures that wrong labels have outvoted is put
    right by its sounds. Clips vote in both modalities together. All are pooled by what each adds.

    At most M + 2 tables [n, C] float32 are held at a time, where M votes are pooled that are no arguments.

    Args:
        spaces: features of this rank's ids, `row_range(N)`.
        given: [N] int64 labels.
        num_classes: C.
        groups: [N] int64; samples of one group do not vote for each other.
        valid: [N] bool; samples without features neither vote nor are voted on, they keep their label.
        voting: the votes to choose among.
        before: what earlier corrections found.
        teachers: what networks that were shown no label hold picture and sound for, [n, C] each: two more voices, and
            another way to tell what a sound is.
    """
    own, present = local_shard(given), local_shard(valid)
    fitting = fitting_neighbors(search_space.num_neighbors, len(given), num_classes)
    search_space = replace(
        search_space,
        num_neighbors=fitting,
        second_round_neighbors=[each for each in search_space.second_round_neighbors if each <= max(fitting)] or [0],
    )
    judges = VoteCalibrator(own, num_classes, present)
    problem = VoteTask(given, own, num_classes, groups, valid, present, search_space, judges)
    likelihood_before = prior.rate_log_likelihood if prior else None

    by_sight, pictures = select_label_vote(problem, spaces, lambda space: space.visual, likelihood_before)
    seen = by_sight.calibration
    rate = _rate(seen.rate_log_likelihood, num_classes)
    shown, _ = estimate_transition_matrix(pictures, own, rate.estimate, seen.error_distribution)
    pairing, heard_name, heard = select_audio_vote(problem, spaces, shown, teachers[1] if teachers else None)
    del shown
    sounds, correspondence = pairing.shares, pairing.correspondence
    heard_as = sounds.argmax(1)
    across = replace(problem, given=all_gather_variable_rows(heard_as), own=heard_as)
    # Neighbours are searched anew: kept for every kind of features, they would take several times the memory.
    by_hearing, hearing = select_label_vote(across, spaces, lambda space: space.visual, likelihood_before)
    by_both, both = select_label_vote(
        problem, spaces, partial(joint_features, problem, correspondence), likelihood_before
    )
    joint = by_both.calibration

    fused = in_tiles(num_classes, _joined, pictures, sounds, correspondence)
    experts = {"fused": fused, "joint": both, "pictures": pictures, "across": hearing}
    del fused, both, pictures, hearing
    if prior:
        experts["before"] = prior.held_out
    asked = [judges.calibrate(each, likelihood_before) for each in teachers or ()]
    if teachers:
        picture, sound = (
            calibration.inverse_temperature(each) for calibration, each in zip(asked, teachers, strict=True)
        )
        experts["teacher of pictures"] = picture
        experts["teacher of sounds"] = in_tiles(num_classes, _alone, sound, correspondence)
        del picture, sound
    pooled, weights = judges.fit_ensemble(
        list(experts.values()), seen.error_distribution, rate.estimate if prior else None
    )
    pooled_as = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(experts, weights, strict=True))
    experts.clear()
    voices = [
        (seen, by_sight.rate_log_likelihood_credible),
        (joint, by_both.rate_log_likelihood_credible),
        *((each, each.rate_log_likelihood) for each in asked),
    ]
    soundest, told = min(voices, key=lambda voice: _width(_rate(voice[0].rate_log_likelihood, num_classes)))
    told = prior.rate_log_likelihood_credible if prior else told
    outcome = judges.calibrate(pooled, soundest.rate_log_likelihood if likelihood_before is None else likelihood_before)
    held_out = outcome.inverse_temperature(pooled)
    del pooled
    label_rate = _rate(outcome.rate_log_likelihood, num_classes).spanning(_rate(told, num_classes))
    posterior, matrix = estimate_transition_matrix(held_out, own, label_rate.estimate, outcome.error_distribution)
    # The class of the sound: its own votes, and the picture's as far as they belong together.
    by_ear = [in_tiles(num_classes, _joined, sounds, each, correspondence) for each in (held_out, posterior)]
    nats = (
        max(each.per_sample for each in (seen, joint, *asked)) - judges.prior_log_likelihood()
    ) * outcome.num_samples

    pair_rate = pairing.mismatch_rate
    if not seen.is_asymmetric:
        pair_rate = reconcile_pair_rate(pair_rate, seen.rate_log_likelihood, heard, num_classes)
    has_signal = nats > search_space.min_log_likelihood_gain
    if not has_signal:
        present = torch.zeros_like(present)
    shares = [held_out, posterior, *by_ear]
    for each in shares:
        _keep_labels(each, own, ~present)
    return Correction(
        *shares,
        correspondence=torch.where(present, correspondence, torch.ones_like(correspondence)),
        rate_log_likelihood=outcome.rate_log_likelihood,
        rate_log_likelihood_credible=told,
        label_rate=label_rate,
        transition_matrix=matrix,
        pair_rate=pair_rate,
        log_likelihood_gain=nats,
        has_signal=has_signal,
        selected_votes={
            "pictures": by_sight.name,
            "sounds": heard_name,
            "joint": by_both.name,
            "across": by_hearing.name,
            "pooled": pooled_as,
        },
    )


def fitting_neighbors(neighbors: Sequence[int], num_samples: int, num_classes: int) -> list[int]:
    """Return the numbers of neighbours that a set allows; a small one tries halves of the fewest too.

    Halves are added until half a class of average size has as many: more of them come from other classes.
    """
    fitting = [k for k in neighbors if k < num_samples]
    while fitting and min(fitting) > max(2, num_samples / (2 * num_classes)):
        fitting.insert(0, min(fitting) // 2)
    return fitting


def identity_correction(given: Tensor, num_classes: int) -> Correction:
    """Return the correction that leaves all labels and pairs as they are and tells nothing of the noise.

    Args:
        given: [N] int64 labels.
        num_classes: C.
    """
    own = local_shard(given)
    kept = torch.zeros(len(own), num_classes, device=given.device).scatter_(1, own[:, None], 1.0)
    evidence = torch.zeros_like(rates(num_classes), device=given.device)
    rate = _rate(evidence, num_classes)
    return Correction(
        held_out=kept,
        posterior=kept.clone(),
        audio_held_out=kept.clone(),
        audio_posterior=kept.clone(),
        correspondence=torch.ones_like(kept[:, 0]),
        rate_log_likelihood=evidence,
        rate_log_likelihood_credible=evidence,
        label_rate=rate,
        transition_matrix=kept.new_zeros(num_classes, num_classes + 1),
        pair_rate=rate,
        log_likelihood_gain=0.0,
        has_signal=False,
        selected_votes={},
    )


def _rate(evidence: Tensor, num_classes: int) -> RateEstimate:
    return estimate_rate(evidence, rates(num_classes).to(evidence.device))


def _width(rate: RateEstimate) -> float:
    return rate.ci95_high - rate.ci95_low


def _joined(shares: Tensor, other: Tensor, correspondence: Tensor) -> Tensor:
    """Return shares of one modality with those of the other as far as both belong together: [t, C]."""
    return normalized((shares * gate_by_correspondence(other, correspondence)).clamp_min_(1e-30))


def _alone(other: Tensor, correspondence: Tensor) -> Tensor:
    """Return what shares of the other modality say of one, in doubt nothing: [t, C]."""
    return normalized(gate_by_correspondence(other, correspondence))


def _keep_labels(shares: Tensor, own: Tensor, kept: Tensor) -> None:
    """Give some samples their labels back, in place: [n, C] shares, [n] labels, [n] bool."""
    rows = kept.nonzero().squeeze(1)
    shares[rows] = 0.0
    shares[rows, own[rows]] = 1.0
