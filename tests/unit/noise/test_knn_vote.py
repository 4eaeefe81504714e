"""Held-out k-NN votes and whitening."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.noise.knn_vote import NeighborGraph, pca_whiten, source_halves, source_weights
from tests.unit.noise.scenes import Scene, make_scene


def test_labels_never_contribute_to_their_own_vote():
    """Changing the label of one sample changes the votes of other samples, but not its own."""
    scene = make_scene(0.6, 0.0, num_samples=300, spread=2.0)
    valid = torch.ones(300, dtype=torch.bool)
    graph = NeighborGraph(pca_whiten(scene.visual, valid, 16, 0.5), 30, torch.arange(300), valid)
    num_changed = {0: 0, 10: 0}
    for sample in range(0, 300, 3):
        changed = scene.given.clone()
        changed[sample] = (scene.given[sample] + 3) % 10
        first_rounds = [(labels, graph.vote(labels, 10, 30, 0.2)) for labels in (scene.given, changed)]
        for voters in num_changed:
            before, after = (vote.table(voters) for labels, vote in first_rounds)
            torch.testing.assert_close(before[sample], after[sample], rtol=1e-5, atol=1e-6)
            num_changed[voters] += not torch.allclose(before, after, rtol=1e-5, atol=1e-6)
    assert num_changed[0] == 100 and num_changed[10] > 50


def grouped_scene() -> tuple[Scene, NeighborGraph, Tensor]:
    """Return a scene with groups of one to five samples, and its neighbor graph."""
    scene = make_scene(0.5, 0.0, num_samples=300, spread=2.0)
    generator = torch.Generator().manual_seed(2)
    groups = torch.repeat_interleave(torch.arange(100), torch.arange(100) % 5 + 1)[:300]
    groups = groups[torch.randperm(300, generator=generator)]
    valid = torch.ones(300, dtype=torch.bool)
    return scene, NeighborGraph(pca_whiten(scene.visual, valid, 16, 0.5), 30, groups, valid), groups


def test_a_group_of_several_samples_weighs_as_much_as_one_sample():
    """Sample 0 has three neighbors of equal similarity: two of one group, and one alone."""
    features = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]), dim=1)
    valid = torch.ones(4, dtype=torch.bool)
    labels = torch.tensor([0, 1, 1, 2])
    for groups, expected in (([0, 1, 1, 2], [0.0, 0.5, 0.5]), ([0, 1, 2, 3], [0.0, 2 / 3, 1 / 3])):
        vote = NeighborGraph(features, 3, torch.tensor(groups), valid).vote(labels, 3, 3, 0.2)
        assert vote.table()[0].tolist() == pytest.approx(expected)


def test_repeating_all_samples_of_a_group_does_not_change_the_votes_of_others():
    scene = make_scene(0.3, 0.0, num_samples=100, spread=1.5)
    features = pca_whiten(scene.visual, torch.ones(100, dtype=torch.bool), 16, 0.5)
    repeated = torch.cat([torch.arange(100), torch.arange(0, 100, 3).repeat(2)])
    single, several = (
        NeighborGraph(features[rows], len(rows) - 1, rows, torch.ones(len(rows), dtype=torch.bool)).vote(
            scene.given[rows], 10, len(rows) - 1, 0.2
        )
        for rows in (torch.arange(100), repeated)
    )
    torch.testing.assert_close(several.table()[:100], single.table(), rtol=1e-4, atol=1e-5)


def test_weights_of_samples_sum_to_1_in_each_group():
    groups = torch.tensor([7, 3, 3, 9, 3, 7])
    weights = source_weights(groups)
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 3, 1, 1 / 3, 1 / 2])
    assert float(weights.sum()) == pytest.approx(3)


def test_halves_have_equal_numbers_of_sources_and_do_not_divide_any():
    groups = torch.arange(40).repeat_interleave(torch.arange(40) % 3 + 1)
    halves = source_halves(groups)
    by_group = [halves[groups == group].unique() for group in range(40)]
    assert all(len(values) == 1 for values in by_group)
    assert int(torch.cat(by_group).sum()) == 20


def test_votes_of_a_half_do_not_depend_on_the_labels_of_the_other_half():
    scene, graph, groups = grouped_scene()
    rows, halves = torch.arange(0, 300, 7), source_halves(groups)
    votes = graph.half_votes(rows, scene.given, 10, 30, 0.2)
    changed = graph.half_votes(rows, torch.where(halves == 0, (scene.given + 1) % 10, scene.given), 10, 30, 0.2)
    assert torch.equal(changed[1], votes[1]) and not torch.equal(changed[0], votes[0])
    # The vote of all is the mean of both halves, weighted by their voters.
    weights = graph.vote_weights(rows, 30, 0.2)
    shares = torch.stack([(weights * (halves[graph.ids[rows, :30]] == half)).sum(1) for half in (0, 1)])
    shares /= shares.sum(0)
    expected = (torch.stack(votes) * shares[..., None]).sum(0)
    torch.testing.assert_close(graph.vote(scene.given, 10, 30, 0.2).of_rows(rows), expected)


def test_labels_never_contribute_to_their_own_second_round_with_weights_of_groups():
    scene, graph, groups = grouped_scene()
    assert len(groups.unique()) == 100 and float(graph.voter_weights.min()) == pytest.approx(0.2)
    num_changed = 0
    for sample in range(0, 300, 3):
        for offset in (1, 4):
            changed = scene.given.clone()
            changed[sample] = (scene.given[sample] + offset) % 10
            before, after = (graph.vote(labels, 10, 30, 0.2).table(10) for labels in (scene.given, changed))
            torch.testing.assert_close(before[sample], after[sample], rtol=1e-5, atol=1e-6)
            num_changed += not torch.allclose(before, after, rtol=1e-5, atol=1e-6)
    assert num_changed > 30


def test_full_whitening_equalizes_the_variances():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 6, generator=generator) * torch.tensor([100.0, 10.0, 1.0, 1.0, 1.0, 1.0]) + 5
    valid = torch.ones(4000, dtype=torch.bool)
    assert pca_whiten(rows, valid, 6, 0.0)[:, 0].square().mean() > 0.9
    whitened = pca_whiten(rows, valid, 6, 1.0)
    torch.testing.assert_close(whitened.square().mean(0), torch.full((6,), 1 / 6), rtol=0.1, atol=0)
    torch.testing.assert_close(whitened.norm(dim=1), torch.ones(4000))
