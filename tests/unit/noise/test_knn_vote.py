"""Held-out k-NN votes and whitening."""

import torch

from distav.noise.knn_vote import NeighborGraph, pca_whiten
from tests.unit.noise.scenes import make_scene


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
            before, after = (
                vote.second_round(labels, voters) if voters else vote.probs for labels, vote in first_rounds
            )
            torch.testing.assert_close(before[sample], after[sample], rtol=1e-5, atol=1e-6)
            num_changed[voters] += not torch.allclose(before, after, rtol=1e-5, atol=1e-6)
    assert num_changed[0] == 100 and num_changed[10] > 50


def test_full_whitening_equalizes_the_variances():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 6, generator=generator) * torch.tensor([100.0, 10.0, 1.0, 1.0, 1.0, 1.0]) + 5
    valid = torch.ones(4000, dtype=torch.bool)
    assert pca_whiten(rows, valid, 6, 0.0)[:, 0].square().mean() > 0.9
    whitened = pca_whiten(rows, valid, 6, 1.0)
    torch.testing.assert_close(whitened.square().mean(0), torch.full((6,), 1 / 6), rtol=0.1, atol=0)
    torch.testing.assert_close(whitened.norm(dim=1), torch.ones(4000))
