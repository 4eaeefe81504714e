"""Held-out k-NN votes on label lists: for each class, the fraction of the neighbors that have its label.

Legend: N samples, n samples of this rank, t samples of a tile, C classes, k neighbors, E feature width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.distributed.collectives import all_reduce_sum_, local_shard
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.multi_label_model import LabelVotes, fit_model
from distav.noise.tiling import tiles

MEMBERS = ("visual", "audio", "joint")
"""Features whose neighbors vote."""
PSEUDO_VOTES = 1.0
"""Number of votes with the class frequencies that is added to those of the neighbors."""
MAX_SELECTION_PAIRS = 1_000_000
"""Pairs of a sample and a class on which configurations are compared; more do not change the selection."""


@dataclass(frozen=True)
class ListVoteConfig:
    """Configuration of a vote.

    Attributes:
        space: feature space.
        whitening: whitening power.
        k: number of neighbors.
        temperature: votes are weighted by exp(similarity / temperature).
    """

    space: str
    whitening: float
    k: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.space}, whitening {self.whitening:g}, {self.k} neighbors, temperature {self.temperature:g}"


@dataclass(frozen=True)
class ListVoteSearch:
    """Candidate configurations; see `LabelCorrectionPhase` for the settings of the same names."""

    num_neighbors: Sequence[int]
    vote_temperatures: Sequence[float]
    whitening_powers: Sequence[float]
    num_components: int
    num_probes: int | None = None
    """Lists that an approximate search for neighbors probes; None for the exact search."""


@dataclass(frozen=True)
class ListVoteTask:
    """What the votes are about.

    Attributes:
        given: [N, C] bool given labels of all samples.
        groups: [N] int64; samples of one group do not vote for each other.
        has_modality: [N] bool by modality.
        offsets: [C] float64 logits of the class frequencies.
    """

    given: Tensor
    groups: Tensor
    has_modality: Mapping[str, Tensor]
    offsets: Tensor

    @property
    def has_any(self) -> Tensor:
        """Samples with features of a modality, [N] bool."""
        return torch.stack(list(self.has_modality.values())).any(0)

    def members(self) -> dict[str, Tensor]:
        """Return the members that have voters, with the samples that have their features, [N] bool."""
        candidates = {"visual": self.has_modality["visual"], "audio": self.has_modality["audio"], "joint": self.has_any}
        return {name: valid for name, valid in candidates.items() if int(valid.sum()) > 1}


def class_offsets(given: Tensor) -> Tensor:
    """Return the logits of the class frequencies of labels [N, C] bool, with one more clip of each kind: [C]."""
    counts = given.double().sum(0)
    return (counts + 1).log() - (len(given) - counts + 1).log()


def vote_log_odds(graph: NeighborGraph, task: ListVoteTask, k: int, temperature: float) -> Tensor:
    """Return the votes of the k nearest neighbors as log-odds relative to the class frequencies: [n, C] float32.

    The vote is the weighted fraction of the neighbors with the label; `PSEUDO_VOTES` votes with the class frequency are
    added to the effective number of neighbors. It is 0 for samples without neighbors.
    """
    num_classes = task.given.shape[1]
    given, frequency = task.given.to(torch.uint8), task.offsets.sigmoid().float()
    log_odds = torch.empty(len(graph.ids), num_classes, device=task.given.device)
    for part in tiles(len(graph.ids), num_classes * k, task.given.device):
        weights = graph.vote_weights(part, k, temperature)
        total = weights.sum(1, keepdim=True)
        effective = total.square() / weights.square().sum(1, keepdim=True).clamp_min(1e-30)
        weights = weights / total.clamp_min(1e-30)
        labels = given[graph.ids[part, :k].clamp_min(0).long()].float()
        votes = torch.einsum("tk,tkc->tc", weights, labels)
        effective = torch.where(total > 0, effective, torch.zeros_like(effective))
        smoothed = (effective * votes + PSEUDO_VOTES * frequency) / (effective + PSEUDO_VOTES)
        log_odds[part] = torch.logit(smoothed.double(), 1e-6).sub(task.offsets).float()
    return log_odds


def select_votes(
    spaces: Mapping[str, tuple[Tensor, Tensor]], task: ListVoteTask, search: ListVoteSearch
) -> dict[str, tuple[ListVoteConfig, Tensor]]:
    """Return for each member the configuration with the highest likelihood of the given labels, and its votes.

    Configurations are compared by a noise model with one weight, one offset and two rates for all classes together.

    Args:
        spaces: visual and audio features [n, E] of this rank by name of the space.
        task: the labels.
        search: candidate configurations.

    Returns:
        Configuration and votes [n, C] by member.
    """
    members = task.members()
    best: dict[str, tuple[float, ListVoteConfig, Tensor]] = {}
    rows = _selection_rows(task)
    given = local_shard(task.given)[rows]
    for config_space, whitening, features in _feature_spaces(spaces, task, search):
        for name, valid in members.items():
            ks = [k for k in search.num_neighbors if k < int(valid.sum())] or [int(valid.sum()) - 1]
            graph = NeighborGraph(features[name], max(ks), task.groups, valid, search.num_probes)
            for k in ks:
                for temperature in search.vote_temperatures:
                    votes = vote_log_odds(graph, task, k, temperature)
                    score = _pooled_log_likelihood(votes[rows], given, task.offsets)
                    if name not in best or score > best[name][0]:
                        best[name] = score, ListVoteConfig(config_space, whitening, k, temperature), votes
    return {name: best[name][1:] for name in members}


def _feature_spaces(
    spaces: Mapping[str, tuple[Tensor, Tensor]], task: ListVoteTask, search: ListVoteSearch
) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """Yield name, whitening power, and the unit features [n, E] of each member."""
    present = {name: local_shard(mask) for name, mask in task.has_modality.items()}
    for space, (visual, audio) in spaces.items():
        for power in search.whitening_powers:
            rows = {
                "visual": pca_whiten(visual, present["visual"], search.num_components, power),
                "audio": pca_whiten(audio, present["audio"], search.num_components, power),
            }
            rows["joint"] = F.normalize(torch.cat([rows["visual"], rows["audio"]], dim=1), dim=1)
            yield space, power, rows


def _selection_rows(task: ListVoteTask) -> Tensor:
    """Return the rows of this rank on which configurations are compared."""
    usable = local_shard(task.has_any).nonzero().squeeze(1)
    total = int(all_reduce_sum_(torch.tensor([float(len(usable))], dtype=torch.float64, device=usable.device)))
    return usable[:: max(1, -(-total * task.given.shape[1] // MAX_SELECTION_PAIRS))]


def _pooled_log_likelihood(votes: Tensor, given: Tensor, offsets: Tensor) -> float:
    """Return the log-likelihood of the given labels under one model for all classes: votes [n, C] and labels [n, C].

    The log-odds include the offsets, so that the classes form one class with n C samples.
    """
    pooled = torch.stack([votes, offsets.float().expand_as(votes)], dim=2).reshape(-1, 1, 2)
    task = LabelVotes(pooled, given.reshape(-1, 1), torch.zeros(1, dtype=torch.float64, device=votes.device))
    return fit_model(task, num_rounds=0).log_likelihood
