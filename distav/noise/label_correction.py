"""Label correction with held-out k-NN votes of both modalities.

Neighbors in the visual, the audio and the concatenated features vote with the given labels. The configuration of each
vote (features, whitening, number of neighbors, temperature, voting rounds) maximizes the likelihood of these labels.
The latent-variable model of `distav.noise.vote_model` combines the votes and estimates the noise. True labels are never
used.
Legend: N samples, n samples of this rank, C classes, R candidate rates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor

from distav.distributed.collectives import local_shard
from distav.noise.correction import Correction, CorrectionPrior
from distav.noise.knn_vote import source_weights
from distav.noise.label_model import LabelModel, fit_label_model, gain_and_temperature
from distav.noise.model_fit import PairAssumption, fit_elements, select_fit_rows
from distav.noise.model_parameters import Votes
from distav.noise.noise_rate import MAX_INTERVAL_WIDTH, cautious_odds_factor, transition_matrix, unknown_rate
from distav.noise.rate_fit import COARSE_GRID
from distav.noise.threads import call_concurrently
from distav.noise.vote_score import VoteScorer, log_votes
from distav.noise.vote_search import (
    FeatureSpace,
    SelectedVote,
    VoteSearchSpace,
    VoteTask,
    feasible_search_space,
    joint_features,
    select_vote,
)
from distav.noise.vote_tables import VoteTables

VISUAL_OWNERS = (0.97, 0.03, 0.5)
"""Assumptions on the fraction of mismatched pairs whose label names the class of the frames: nearly all, nearly none,
and half of them."""
MIN_MISMATCH = 0.05
"""Mismatch rate below which the owner of the labels hardly matters; if it is below under all assumptions, only the
first one is tried."""
MAX_CONCURRENT_SAMPLES = 50_000
"""Samples up to which votes are searched at the same time; each search holds the neighbors of all samples."""

T = TypeVar("T")


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
    """Correct labels with held-out k-NN votes of both modalities.

    The visual and the audio votes come first; the correspondence probabilities of a first fit scale the audio in the
    concatenated features of the joint vote, and a second fit uses all votes. In the first correction of a run this is
    repeated for each assumption on the owner of the labels, unless nearly all pairs match, and the likely one is kept.
    If the votes predict the given labels no better than class frequencies do (``min_log_likelihood_gain``), the labels
    are returned unchanged; if those of one modality do not, the mismatch rate is unknown.

    Votes and the class probabilities of the modalities are float16. In addition to the arguments, a search holds the
    neighbors [n, k] of 8 bytes each, and up to three tables [n, C] of votes, or two and one for each assumed owner; the
    six tables of the result are held together with three of votes. A single rank on a CPU searches several votes at the
    same time, up to `MAX_CONCURRENT_SAMPLES`.

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
            another vote of each modality.
    """
    valid = torch.stack(list(has_modality.values())).any(0)
    local_labels, present = local_shard(given), local_shard(valid)
    has_both = torch.stack(list(has_modality.values())).all(0)
    paired = local_shard(has_both)
    search_space = feasible_search_space(search_space, len(given), num_classes)
    scorer = VoteScorer(local_labels, num_classes, present)
    fit_rows = select_fit_rows(present, num_classes)
    task = VoteTask(given, num_classes, groups, valid, present, has_modality, search_space, scorer, fit_rows)
    sample_weights = local_shard(source_weights(groups))
    rate_priors = (prior.rate_log_likelihood, prior.pair_rate_log_likelihood) if prior else None

    def call_all(functions: Sequence[Callable[[], T]]) -> list[T]:
        if len(given) <= MAX_CONCURRENT_SAMPLES:
            return call_concurrently(functions, given.device)
        return [function() for function in functions]

    def fit_data(votes: VoteTables) -> tuple[Votes, Tensor, int, Tensor]:
        subset = replace(votes.rows(fit_rows), visual_halves=halves[0], audio_halves=halves[1])
        return subset, local_labels[fit_rows], num_classes, sample_weights[fit_rows]

    searches = [partial(select_vote, task.restricted(name), spaces, attrgetter(name)) for name in ("visual", "audio")]
    visual, audio = call_all(searches)
    votes = _votes(task, visual, audio, prior, teachers)
    halves = [[log_votes(table) for table in vote.half_votes] for vote in (visual, audio)]
    selected_votes = {"visual": str(visual.config), "audio": str(audio.config)}
    scores = [visual.score, audio.score]
    if teachers is not None:
        scores = [max(score, scorer.score(probs)) for score, probs in zip(scores, teachers, strict=True)]
    knows_pairs = min(map(scorer.gain, scores)) > search_space.min_log_likelihood_gain
    del visual, audio  # Their tables.
    owners = [prior.visual_owner] if prior else VISUAL_OWNERS
    data = fit_data(votes)
    fits = [partial(fit_label_model, *data, PairAssumption(w), rate_priors, is_preliminary=True) for w in owners]
    models = call_concurrently(fits, given.device, fit_elements(len(fit_rows), num_classes, len(COARSE_GRID)))
    if all(model.pair_mismatch < MIN_MISMATCH for model in models):
        models = models[:1]
    compare = fit_data if len(models) > 1 else None
    candidates = call_all([partial(_candidate, task, spaces, votes, owner_model, compare) for owner_model in models])
    chosen = _likely_owner(candidates)
    del candidates
    pairs, votes, selected_votes["joint"] = chosen.pairs, votes.with_joint(chosen.joint.votes), str(chosen.joint.config)
    del chosen
    model = fit_label_model(*fit_data(votes), pairs, rate_priors)
    result = model.posterior(votes, local_labels)
    del votes
    has_signal = model.gain > search_space.min_log_likelihood_gain
    rate_log_likelihood = model.rate_log_likelihood.to(given.device)
    pair_log_likelihood, pair_rate = model.pair_rate_log_likelihood.to(given.device), model.pair_rate
    if not (has_signal and knows_pairs):
        pair_log_likelihood, pair_rate = torch.zeros_like(pair_log_likelihood), unknown_rate(num_classes)
    is_confounded = bool(has_both.any()) and pair_rate.ci95_width > MAX_INTERVAL_WIDTH
    corrected = present if has_signal else torch.zeros_like(present)
    for probs in (getattr(result, field.name) for field in fields(result) if field.name != "correspondence"):
        _restore_labels(probs, local_labels, ~corrected)
    return Correction(
        held_out=result.owner_held_out,
        posterior=result.owner,
        visual_held_out=result.visual_held_out,
        visual_posterior=result.visual,
        audio_held_out=result.audio_held_out,
        audio_posterior=result.audio,
        correspondence=torch.where(corrected & paired, result.correspondence, 1.0),
        rate_log_likelihood=rate_log_likelihood,
        pair_rate_log_likelihood=pair_log_likelihood,
        label_rate=model.label_rate if has_signal else unknown_rate(num_classes),
        transition_matrix=transition_matrix(result.owner, local_labels, corrected),
        pair_rate=pair_rate,
        visual_owner=float(model.pair.visual_owner),
        log_likelihood_gain=model.gain,
        has_signal=has_signal,
        selected_votes=selected_votes,
        caution=cautious_odds_factor(rate_log_likelihood, num_classes) if is_confounded else 1.0,
    )


@dataclass(frozen=True)
class _Candidate:
    """An assumption on the owner of the labels.

    Attributes:
        pairs: the assumption, with the mismatch rate that follows from it.
        joint: joint vote in features whose audio is scaled accordingly.
        gain, temperature: see `gain_and_temperature`.
    """

    pairs: PairAssumption
    joint: SelectedVote
    gain: float
    temperature: float


def _candidate(
    task: VoteTask,
    spaces: Sequence[FeatureSpace],
    votes: VoteTables,
    owner_model: LabelModel,
    fit_data: Callable[[VoteTables], tuple[Votes, Tensor, int, Tensor]] | None,
) -> _Candidate:
    """Return the joint vote under an assumption on the owner; without `fit_data`, its likelihood is not computed."""
    features_of = partial(joint_features, task, owner_model.correspondence(votes, local_shard(task.labels)))
    joint, gain, temperature = select_vote(task, spaces, features_of), 0.0, 1.0
    if fit_data is not None:
        gain, temperature = gain_and_temperature(*fit_data(votes.with_joint(joint.votes)), owner_model.pairs)
    return _Candidate(owner_model.pairs, joint, gain, temperature)


def _likely_owner(candidates: Sequence[_Candidate]) -> _Candidate:
    """Return the assumption that is nearest to the average over all, weighted by their likelihood.

    If the votes say little on the owner, this is the one that half of the labels belong to each modality.
    """
    gains, temperatures, owners = torch.tensor(
        [(candidate.gain, candidate.temperature, candidate.pairs.visual_owner) for candidate in candidates],
        dtype=torch.float64,
    ).T
    average = (gains / temperatures.mean()).softmax(0) @ owners
    return candidates[int((owners - average).abs().argmin())]


def _votes(
    task: VoteTask,
    visual: SelectedVote,
    audio: SelectedVote,
    prior: CorrectionPrior | None,
    teachers: tuple[Tensor, Tensor] | None,
) -> VoteTables:
    """Return the votes without the joint one."""
    visual_teacher, audio_teacher = ([], []) if teachers is None else ([probs] for probs in teachers)
    return VoteTables(
        visual=[visual.votes, *visual_teacher],
        audio=[audio.votes, *audio_teacher],
        joint=[prior.held_out] if prior else [],
        has_visual=local_shard(task.has_modality["visual"]),
        has_audio=local_shard(task.has_modality["audio"]),
    )


def _restore_labels(probs: Tensor, labels: Tensor, restored: Tensor) -> None:
    """Set the probabilities of selected samples to their given labels, in place: [n, C], [n], [n] bool."""
    rows = restored.nonzero().squeeze(1)
    probs[rows] = 0.0
    probs[rows, labels[rows]] = 1.0
