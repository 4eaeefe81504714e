"""Search over configurations of the k-NN vote.

Votes are selected by the likelihood of the given labels, see `distav.noise.vote_score`.
Legend: N samples, n samples of this rank, C classes, E feature width.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from distav.distributed.collectives import all_gather_variable_rows, local_shard
from distav.noise.knn_vote import KnnVote, NeighborGraph, pca_whiten
from distav.noise.vote_score import VoteScorer
from distav.noise.vote_tables import VOTE_DTYPE


@dataclass(frozen=True)
class VoteSearchSpace:
    """Grid of vote configurations.

    Attributes:
        num_neighbors: voters k; values that the dataset is too small for are left out.
        second_round_neighbors: voters of a second round, which vote with the classes that their first rounds predict;
            0 for a single round.
        vote_temperatures: temperatures of the similarity in the weights of the voters.
        whitening_powers: powers of the standard deviation that principal components are divided by.
        num_components: principal components kept.
        min_log_likelihood_gain: gain over the class frequencies, in nats, below which the labels are not corrected.
        num_probes: lists that an approximate search for neighbors probes; None for the exact search.
    """

    num_neighbors: Sequence[int] = (50, 200, 400)
    second_round_neighbors: Sequence[int] = (0, 20, 100)
    vote_temperatures: Sequence[float] = (0.07, 0.2, 0.4)
    whitening_powers: Sequence[float] = (0.0, 0.5)
    num_components: int = 48
    min_log_likelihood_gain: float = 10.0
    num_probes: int | None = None


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


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """Features of this rank's samples in which neighbors are searched: [n, E] of each modality."""

    name: str
    visual: Tensor
    audio: Tensor


FeaturesOf = Callable[[FeatureSpace], Tensor]
"""Returns the features [n, E] of a space in which neighbors are searched."""


@dataclass(frozen=True)
class VoteTask:
    """Input of a vote search.

    Attributes:
        labels: [N] int64 classes that the neighbors vote with.
        num_classes: C.
        groups: [N] int64; samples of one group do not vote for each other.
        valid: [N] bool, samples with features of the modality that is searched.
        present: [n] bool, those of this rank.
        has_modality: [N] bool by modality, samples with its features.
        search_space: configurations.
        scorer: scores votes on the given labels.
        fit_rows: [t] row numbers of the samples that the model is fitted to.
    """

    labels: Tensor
    num_classes: int
    groups: Tensor
    valid: Tensor
    present: Tensor
    has_modality: Mapping[str, Tensor]
    search_space: VoteSearchSpace
    scorer: VoteScorer
    fit_rows: Tensor

    def restricted(self, modality: str) -> "VoteTask":
        """Return the task for votes of the samples that have a modality; votes of all others are uniform."""
        valid = self.has_modality[modality]
        return replace(self, valid=valid, present=local_shard(valid))


@dataclass(frozen=True)
class VoteConfig:
    """Configuration of a k-NN vote.

    Attributes:
        space: features in which the neighbors are searched.
        whitening_power: power of the standard deviation that principal components are divided by.
        k: voters of the first round.
        temperature: temperature of the similarity in the weights of the voters.
        second_round_neighbors: voters of the second round; 0 for a single round.
    """

    space: FeatureSpace
    whitening_power: float
    k: int
    temperature: float
    second_round_neighbors: int = 0

    def __str__(self) -> str:
        rounds = f"second round k {self.second_round_neighbors}" if self.second_round_neighbors else "single round"
        return (
            f"{self.space.name}, whitening {self.whitening_power:g}, k {self.k}, temperature {self.temperature:g}, "
            f"{rounds}"
        )


def vote_configs(spaces: Sequence[FeatureSpace], search_space: VoteSearchSpace) -> list[VoteConfig]:
    """Return the configurations of a search space; those that share a neighbor graph or a first round are adjacent."""
    return [
        VoteConfig(space, power, k, temperature, second_round_neighbors)
        for space, power, k, temperature, second_round_neighbors in itertools.product(
            spaces,
            search_space.whitening_powers,
            search_space.num_neighbors,
            search_space.vote_temperatures,
            search_space.second_round_neighbors,
        )
        if second_round_neighbors <= k
    ]


def iter_graphs(
    task: VoteTask, features_of: FeaturesOf, configs: Sequence[VoteConfig]
) -> Iterator[tuple[NeighborGraph, list[VoteConfig]]]:
    """Yield each neighbor graph with the configurations that use it.

    Graphs are not kept: those of all feature spaces together would take several times the memory of one.
    """
    depth = max(task.search_space.num_neighbors)
    for (space, power), group in itertools.groupby(configs, lambda config: (config.space, config.whitening_power)):
        features = pca_whiten(features_of(space), task.present, task.search_space.num_components, power)
        # Features that equal the mean have no direction and therefore no neighbors.
        has_direction = all_gather_variable_rows((features != 0).any(1).float()) > 0
        graph = NeighborGraph(features, depth, task.groups, task.valid & has_direction, task.search_space.num_probes)
        del features
        yield graph, list(group)
        del graph


def iter_votes(
    task: VoteTask, graph: NeighborGraph, configs: Sequence[VoteConfig]
) -> Iterator[tuple[VoteConfig, KnnVote]]:
    """Yield each configuration with the vote of its neighbors, whose number of second-round voters is not set."""
    for (k, temperature), group in itertools.groupby(configs, lambda config: (config.k, config.temperature)):
        vote = graph.vote(task.labels, task.num_classes, k, temperature)
        for config in group:
            yield config, vote


@dataclass(frozen=True)
class SelectedVote:
    """The vote that predicts the given labels best.

    Attributes:
        config: its configuration.
        votes: [n, C] its votes, of type `VOTE_DTYPE`.
        score: see `VoteScorer.score`.
        half_votes: votes of the first round by the voters of either half, for `VoteTask.fit_rows`: [t, C] each.
    """

    config: VoteConfig
    votes: Tensor
    score: float
    half_votes: Sequence[Tensor]


def select_vote(
    task: VoteTask,
    spaces: Sequence[FeatureSpace],
    features_of: FeaturesOf,
    configs: Sequence[VoteConfig] | None = None,
) -> SelectedVote:
    """Search the configuration whose votes predict the given labels best.

    Configurations are scored on the samples of the scorer alone. The votes of all samples are counted for the best
    configuration of a neighbor graph, and only if it is the best one so far.

    Args:
        task: labels that neighbors vote with, and the scorer of the votes.
        spaces: feature spaces.
        features_of: features of a space that neighbors are searched in.
        configs: configurations to try; those of the search space by default.
    """
    selected: SelectedVote | None = None
    for graph, group in iter_graphs(task, features_of, configs or vote_configs(spaces, task.search_space)):
        best: tuple[float, VoteConfig, KnnVote] | None = None
        score_to_beat = selected.score if selected else -math.inf
        for config, vote in iter_votes(task, graph, group):
            score = task.scorer.score(partial(vote.of_rows, voters=config.second_round_neighbors))
            if score > score_to_beat:
                best, score_to_beat = (score, config, vote), score
        if best is not None:
            selected = None  # Its table is replaced.
            score, config, vote = best
            selected = SelectedVote(
                config,
                vote.table(config.second_round_neighbors, VOTE_DTYPE),
                score,
                graph.half_votes(task.fit_rows, task.labels, task.num_classes, config.k, config.temperature),
            )
        del graph, best, vote  # They hold the neighbors while those of the next graph are searched.
    assert selected is not None
    return selected


def joint_features(task: VoteTask, correspondence: Tensor, space: FeatureSpace) -> Tensor:
    """Return the concatenated features of both modalities, with audio scaled by the correspondence probability.

    The similarity of two samples is f_v.f_v' + c c' f_a.f_a'; the features of a missing modality are zero.
    """
    num_components, power = task.search_space.num_components, task.search_space.whitening_powers[-1]
    has_visual, has_audio = (local_shard(task.has_modality[name]) for name in ("visual", "audio"))
    visual = pca_whiten(space.visual, has_visual, num_components, power)
    audio = pca_whiten(space.audio, has_audio, num_components, power)
    return torch.cat([visual, correspondence[:, None] * audio], dim=1)
