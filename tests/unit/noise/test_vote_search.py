"""Selection of the vote configuration."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.noise.knn_vote import NeighborGraph, pca_whiten
from distav.noise.vote_score import VoteScorer
from distav.noise.vote_search import (
    FeatureSpace,
    VoteConfig,
    VoteSearchSpace,
    VoteTask,
    joint_features,
    select_vote,
    vote_configs,
)
from tests.unit.noise.scenes import NUM_CLASSES, Scene, accuracy, make_scene

SPACE = FeatureSpace("rows", torch.zeros(1, 1), torch.zeros(1, 1))


class ScriptedScorer(VoteScorer):
    """Scorer that returns the given scores for one configuration after the other."""

    scores: list[float]

    def score(self, votes: Tensor | Callable[[Tensor], Tensor]) -> float:
        return self.scores.pop(0)


def make_task(
    scene: Scene,
    search_space: VoteSearchSpace,
    scorer: VoteScorer | None = None,
    groups: Tensor | None = None,
    has_modality: dict[str, Tensor] | None = None,
) -> VoteTask:
    given = scene.given
    valid = torch.ones(len(given), dtype=torch.bool)
    scorer = scorer or VoteScorer(given, NUM_CLASSES, valid)
    groups = torch.arange(len(given)) if groups is None else groups
    has_modality = has_modality or dict.fromkeys(MODALITIES, valid)
    rows = torch.arange(len(given))
    return VoteTask(given, NUM_CLASSES, groups, valid, valid, has_modality, search_space, scorer, rows)


def votes_of(task: VoteTask, config: VoteConfig, features: Tensor) -> Tensor:
    """Return the votes of one configuration, computed without the others."""
    whitened = pca_whiten(features, task.present, task.search_space.num_components, config.whitening_power)
    graph = NeighborGraph(whitened, config.k, task.groups, task.valid)
    vote = graph.vote(task.labels, NUM_CLASSES, config.k, config.temperature)
    return vote.table(config.second_round_neighbors)


@pytest.mark.parametrize(
    ("scores", "selected"),
    [
        ([-1.1, -1.2, -1.3, -1.4], 0),
        ([-1.2, -1.1, -1.3, -1.4], 1),
        ([-1.3, -1.2, -1.1, -1.4], 2),
        ([-1.4, -1.3, -1.2, -1.1], 3),
        ([-1.1, -1.1, -1.2, -1.1], 0),  # Equal scores: the first.
    ],
)
def test_votes_of_the_configuration_with_the_largest_score_are_returned(scores: list[float], selected: int):
    scene = make_scene(0.4, 0.0, num_samples=300, spread=1.5)
    scorer = ScriptedScorer(scene.given, NUM_CLASSES, torch.ones(300, dtype=torch.bool))
    scorer.scores = list(scores)
    task = make_task(scene, VoteSearchSpace((20,), (0, 20), (0.1,), (0.0, 0.5)), scorer)
    space = FeatureSpace("rows", scene.visual, scene.audio)
    vote = select_vote(task, [space], lambda space: space.visual)
    config = vote_configs([space], task.search_space)[selected]
    assert vote.config == config and vote.score == max(scores) and not scorer.scores
    assert torch.equal(vote.votes, votes_of(task, config, scene.visual).half())


def test_no_configuration_of_any_space_has_a_larger_score_than_the_selected_one():
    scene = make_scene(0.5, 0.0, num_samples=400, spread=2.0)
    task = make_task(scene, VoteSearchSpace((10, 40), (0, 10), (0.1, 0.4), (0.0, 0.5), num_components=24))
    noise = torch.randn(400, 32, generator=torch.Generator().manual_seed(8))
    spaces = [FeatureSpace("noise", noise, noise), FeatureSpace("rows", scene.visual, scene.audio)]
    vote = select_vote(task, spaces, lambda space: space.audio)
    scores = {
        config: task.scorer.score(votes_of(task, config, config.space.audio))
        for config in vote_configs(spaces, task.search_space)
    }
    assert len(scores) == 32
    best = max(scores, key=lambda config: scores[config])
    assert vote.config == best and best.space.name == "rows"
    assert vote.score == pytest.approx(scores[best], rel=1e-6) == pytest.approx(task.scorer.score(vote.votes), rel=1e-3)
    assert torch.equal(vote.votes, votes_of(task, best, scene.audio).half())


def test_second_round_is_selected_where_it_predicts_more_labels():
    scene = make_scene(0.7, 0.0, num_samples=600, spread=1.2)
    space = FeatureSpace("rows", scene.visual, scene.audio)
    accuracies = []
    for second_round in ((0,), (0, 10)):
        task = make_task(scene, VoteSearchSpace((20,), second_round, (0.2,), (0.5,)))
        vote = select_vote(task, [space], lambda space: space.visual)
        assert vote.config.second_round_neighbors == second_round[-1]
        accuracies.append(accuracy(vote.votes, scene.true))
    assert accuracies[1] > accuracies[0] + 0.02


def test_samples_of_one_group_do_not_vote_for_each_other():
    """Groups of four samples have equal features and one random label: only their own group predicts it."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.arange(400) // 4
    features = torch.randn(100, 16, generator=generator)[groups]
    given = torch.randint(0, NUM_CLASSES, (100,), generator=generator)[groups]
    scene = Scene(features, features, given, given, given)
    space = FeatureSpace("rows", features, features)
    search_space = VoteSearchSpace((8,), (0,), (0.1,), (0.0,))
    separate, grouped = (
        select_vote(make_task(scene, search_space, groups=group), [space], lambda space: space.visual)
        for group in (torch.arange(400), groups)
    )
    baseline = float((torch.bincount(given) / 400).log()[given].mean())
    assert separate.score > baseline + 1
    assert grouped.score < baseline + 0.02
    torch.testing.assert_close(grouped.votes[::4], grouped.votes[3::4])


def test_samples_without_the_modality_neither_vote_nor_get_votes():
    scene = make_scene(0.2, 0.0, num_samples=300)
    has_audio = torch.arange(300) % 3 != 0
    has_modality = {"visual": torch.ones(300, dtype=torch.bool), "audio": has_audio}
    scene.given[~has_audio] = NUM_CLASSES - 1
    search_space = VoteSearchSpace((20,), (0, 20), (0.2,), (0.0,))
    task = make_task(scene, search_space, has_modality=has_modality)
    space = FeatureSpace("rows", scene.visual, scene.audio)
    audio = select_vote(task.restricted("audio"), [space], lambda space: space.audio)
    torch.testing.assert_close(audio.votes[~has_audio], torch.full((100, NUM_CLASSES), 0.1).half())
    assert accuracy(audio.votes[has_audio], scene.true[has_audio]) > 0.9
    visual = select_vote(task.restricted("visual"), [space], lambda space: space.visual)
    assert accuracy(visual.votes[has_audio], scene.true[has_audio]) < 0.9


def test_similarity_of_joint_features_scales_audio_by_the_correspondence_of_both_samples():
    scene = make_scene(0.0, 0.0, num_samples=60)
    has_modality = {"visual": torch.arange(60) != 1, "audio": torch.arange(60) != 2}
    task = make_task(scene, VoteSearchSpace(whitening_powers=(0.0, 0.5)), has_modality=has_modality)
    correspondence = torch.linspace(0, 1, 60)
    joint = joint_features(task, correspondence, FeatureSpace("rows", scene.visual, scene.audio))
    visual, audio = (
        pca_whiten(features, has_modality[name], 48, 0.5)
        for name, features in (("visual", scene.visual), ("audio", scene.audio))
    )
    assert not visual[1].any() and not audio[2].any()
    expected = visual @ visual.T + torch.outer(correspondence, correspondence) * (audio @ audio.T)
    torch.testing.assert_close(joint @ joint.T, expected, rtol=1e-4, atol=1e-5)
    assert float(F.cosine_similarity(joint, joint.roll(NUM_CLASSES, 0)).mean()) > 0.3


def test_configurations_of_one_graph_and_of_one_first_round_are_adjacent():
    search_space = VoteSearchSpace((10, 50), (0, 20), (0.1, 0.3), (0.0, 0.5))
    configs = vote_configs([SPACE], search_space)
    assert len(configs) == len(set(configs)) == 2 * 2 * (1 + 2)
    assert all(config.second_round_neighbors <= config.k for config in configs)
    rounds = [(config.whitening_power, config.k, config.temperature) for config in configs]
    assert rounds == sorted(rounds)
    assert str(configs[-1]) == "rows, whitening 0.5, k 50, temperature 0.3, second round k 20"
    assert str(configs[0]) == "rows, whitening 0, k 10, temperature 0.1, single round"
