"""Selection of the vote configuration."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distav.noise.calibration import Calibration, VoteCalibrator
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.vote_search import (
    FeatureSpace,
    ScoredConfig,
    VoteConfig,
    VoteSearchSpace,
    VoteTask,
    select,
    select_label_vote,
    vote_configs,
)
from tests.unit.noise.scenes import make_scene

SPACE = FeatureSpace("rows", torch.zeros(1, 1), torch.zeros(1, 1))


class ScriptedCalibrator(VoteCalibrator):
    """Calibrator that returns the given figures for one configuration after the other."""

    figures: list[tuple[float, float]]

    def calibrate(self, votes: Tensor, rate_prior: Tensor | None = None) -> Calibration:
        per_sample, entropy = self.figures.pop(0)
        return replace(super().calibrate(votes, rate_prior), per_sample=per_sample, entropy=entropy)

    def prior_log_likelihood(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("figures", "selected"),
    [
        ([(0.56, 1.0), (0.58, 1.1), (0.60, 1.2), (0.1, 0.1)], 1),  # The first leads until the third excludes it.
        ([(0.56, 1.0), (0.58, 1.2), (0.60, 1.1), (0.1, 0.1)], 2),
        ([(0.56, 1.3), (0.58, 1.2), (0.1, 0.1), (0.59, 1.1)], 3),
        ([(0.60, 1.0), (0.58, 1.1), (0.1, 0.1), (0.1, 0.1)], 0),
    ],
)
def test_released_votes_are_counted_again_if_their_configuration_is_selected(
    figures: list[tuple[float, float]], selected: int
):
    scene = make_scene(0.4, 0.0, num_samples=300, spread=1.5)
    given, valid, groups = scene.given, torch.ones(300, dtype=torch.bool), torch.arange(300)
    calibrator = ScriptedCalibrator(given, 10, valid)
    calibrator.figures = list(figures)
    search_space = VoteSearchSpace((20,), (0, 20), (0.1,), (0.0, 0.5))
    task = VoteTask(given, given, 10, groups, valid, valid, {}, search_space, calibrator)
    space = FeatureSpace("rows", scene.visual, scene.audio)
    vote = select_label_vote(task, [space], lambda space: space.visual, None)
    config = vote_configs([space], search_space)[selected]
    assert vote.name == str(config)
    whitened = pca_whiten(scene.visual, valid, search_space.num_components, config.whitening_power)
    expected = NeighborGraph(whitened, 20, groups, valid).vote(given, 10, 20, 0.1)
    votes = expected.second_round(given, 20) if config.second_round_neighbors else expected.probs
    calibration = VoteCalibrator(given, 10, valid).calibrate(votes)
    torch.testing.assert_close(vote.probs, calibration.calibrate(votes))


def test_configurations_of_one_graph_and_of_one_first_round_are_adjacent():
    search_space = VoteSearchSpace((10, 50), (0, 20), (0.1, 0.3), (0.0, 0.5))
    configs = vote_configs([SPACE], search_space)
    assert len(configs) == len(set(configs)) == 2 * 2 * (1 + 2)
    assert all(config.second_round_neighbors <= config.k for config in configs)
    rounds = [(config.whitening_power, config.k, config.temperature) for config in configs]
    assert rounds == sorted(rounds)
    assert str(configs[-1]) == "rows, whitening 0.5, k 50, temperature 0.3, second round k 20"
    assert str(configs[0]) == "rows, whitening 0, k 10, temperature 0.1, single round"


def scored(per_sample: float, entropy: float, is_asymmetric: bool = False) -> ScoredConfig:
    calibration = Calibration(torch.zeros(2, 3), torch.zeros(2, 2), is_asymmetric, per_sample, entropy, 10)
    return ScoredConfig(VoteConfig(SPACE, 0.0, 20, 0.1), calibration)


def test_least_entropy_within_the_tolerance_is_selected():
    best, confident, worse = scored(-1.0, 0.9), scored(-1.04, 0.5), scored(-1.06, 0.1)
    assert select([best, confident, worse], baseline=-2.0) == (confident, [best, confident])
    asymmetric = scored(-1.14, 0.2, is_asymmetric=True)
    assert select([best, asymmetric], baseline=-2.0) == (asymmetric, [best, asymmetric])
    assert select([best, scored(-1.16, 0.2, is_asymmetric=True)], baseline=-2.0) == (best, [best])


def test_without_a_gain_over_the_baseline_only_the_best_is_selected():
    best, confident = scored(-2.1, 0.9), scored(-2.2, 0.1)
    assert select([best, confident], baseline=-2.0) == (best, [best])
