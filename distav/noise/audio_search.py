"""Selection of the audio vote by its agreement with the classes of the frames.

Legend: n samples of this rank, t samples of a tile, C classes, R noise rates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows
from distav.noise.calibration import Calibration
from distav.noise.class_agreement import ClassAgreement, class_agreement, pair_posterior
from distav.noise.knn_vote import NeighborGraph
from distav.noise.noise_rate import RateEstimate
from distav.noise.probabilities import normalize_rows
from distav.noise.tiling import map_tiles
from distav.noise.vote_search import FeatureSpace, VoteConfig, VoteTask, iter_graphs, iter_votes, vote_configs

MIN_VOTE = 1e-6
"""Lower bound of the probabilities that are averaged with those of a teacher."""


@dataclass(frozen=True)
class AudioVote:
    """The selected audio vote.

    Attributes:
        name: description of its configuration.
        probs: [n, C] calibrated class probabilities of the audio.
        correspondence: [n] probability that audio and frames show the same class.
        mismatch_rate: rate of mismatched pairs from the agreement of both modalities.
        rate_log_likelihood: [R] log-likelihood of the noise rate of the given labels given the audio.
    """

    name: str
    probs: Tensor
    correspondence: Tensor
    mismatch_rate: RateEstimate
    rate_log_likelihood: Tensor


@dataclass(frozen=True)
class AgreeingConfig:
    """A configuration of the audio vote and its agreement with the frames; config None is the teacher alone."""

    config: VoteConfig | None
    agreement: ClassAgreement

    def __str__(self) -> str:
        return str(self.config) if self.config else "teacher"

    @property
    def family(self) -> VoteConfig | None:
        """The configuration without its number of neighbors."""
        return replace(self.config, k=0) if self.config else None


class AgreementSearch:
    """Audio votes compared with the class probabilities of the frames.

    Attributes:
        candidates: all configurations that were compared.
        best: the one that agrees best.
        votes: [n, C] its votes; those of other configurations are not kept.
    """

    def __init__(self, visual_probs: Tensor, usable: Tensor):
        """Compare votes with [n, C] class probabilities; samples outside `usable` [n] are ignored."""
        self._visual_probs, self._usable = visual_probs, usable
        self.candidates: list[AgreeingConfig] = []
        self.best: AgreeingConfig | None = None
        self.votes: Tensor | None = None

    def add(self, config: VoteConfig | None, votes: Tensor) -> None:
        """Compare the votes [n, C] of a configuration."""
        candidate = AgreeingConfig(config, class_agreement(self._visual_probs, votes, self._usable))
        self.candidates.append(candidate)
        if self.best is None or candidate.agreement.per_sample > self.best.agreement.per_sample:
            self.best, self.votes = candidate, votes


def lowest_entropy_in_family(candidates: Sequence[AgreeingConfig], best: AgreeingConfig) -> AgreeingConfig:
    """Return the candidate of least entropy that differs from the best in k alone and agrees at least half as well."""
    minimum = best.agreement.per_sample - abs(best.agreement.per_sample) / 2
    comparable = [
        candidate
        for candidate in candidates
        if candidate.family == best.family and candidate.agreement.per_sample >= minimum
    ]
    return min(comparable, key=lambda candidate: candidate.agreement.entropy)


def select_audio_vote(
    task: VoteTask, spaces: Sequence[FeatureSpace], visual_posterior: Tensor, teacher: Tensor | None
) -> AudioVote:
    """Let audio neighbors vote with the classes of the frames, and select the vote that agrees best with the frames.

    A teacher's probabilities are a candidate too, alone and averaged with each vote. The mismatch rate is read from
    `lowest_entropy_in_family`. The neighbors of the selected vote also vote with the given labels, for the noise rate
    given the audio.

    Args:
        task: given labels and search space.
        spaces: feature spaces.
        visual_posterior: [n, C] class probabilities of the frames.
        teacher: [n, C] class probabilities of the audio from a network that was trained without the labels.
    """
    task = task.restricted("audio")
    visual_task = replace(task, labels=all_gather_variable_rows(visual_posterior.argmax(1)))
    single_round = replace(task.search_space, second_round_neighbors=(0,))
    search = AgreementSearch(visual_posterior, task.paired)
    rate_log_likelihood: Tensor | None = None
    for graph, configs in iter_graphs(task, lambda space: space.audio, vote_configs(spaces, single_round)):
        for config, votes in iter_votes(visual_task, graph, configs):
            search.add(config, votes)
            if teacher is not None:
                averaged = map_tiles(task.num_classes, _geometric_mean, votes, teacher)
                search.add(replace(config, with_teacher=True), averaged)
                del averaged
            del votes
        best = search.best and search.best.config
        if best and replace(best, with_teacher=False) in configs:
            rate_log_likelihood = _calibrate_on_labels(task, graph, best).rate_log_likelihood
        del graph
    if teacher is not None:
        search.add(None, teacher)
        if search.best is search.candidates[-1]:
            rate_log_likelihood = task.calibrator.calibrate(teacher).rate_log_likelihood
    assert search.best is not None and search.votes is not None and rate_log_likelihood is not None
    mismatch = lowest_entropy_in_family(search.candidates, search.best).agreement.rate_log_likelihood
    pairs = pair_posterior(visual_posterior, search.votes, search.best.agreement, mismatch, task.paired)
    return AudioVote(
        str(search.best), pairs.audio_probs, pairs.correspondence, pairs.mismatch_rate, rate_log_likelihood
    )


def _calibrate_on_labels(task: VoteTask, graph: NeighborGraph, config: VoteConfig) -> Calibration:
    """Return the best fit of a configuration with the given labels over all second rounds."""
    configs = [
        replace(config, second_round_neighbors=voters, with_teacher=False)
        for voters in task.search_space.second_round_neighbors
        if voters <= config.k
    ]
    calibrations = (task.calibrator.calibrate(votes) for _, votes in iter_votes(task, graph, configs))
    return max(calibrations, key=lambda calibration: calibration.per_sample)


def _geometric_mean(votes: Tensor, teacher: Tensor) -> Tensor:
    """Return the normalized geometric mean of two votes: [t, C] twice -> [t, C]."""
    return normalize_rows((votes.clamp_min(MIN_VOTE) * teacher.clamp_min(MIN_VOTE)).sqrt_())
