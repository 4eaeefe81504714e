"""k-NN and linear probes on label lists."""

import pytest
import torch

from distav.evaluation.probing import MultiLabelProbe, knn_class_probs, knn_label_probs


def test_label_probabilities_are_weighted_fractions_of_the_neighbors():
    keys = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.0, 0.0]])
    labels = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)
    query = torch.tensor([[2.0, 0.0]])
    probs = knn_label_probs(keys, labels, query, k=2, temperature=0.5)
    weights = torch.tensor([1.0, 0.8]).div(0.5).softmax(0)
    torch.testing.assert_close(probs, torch.stack([weights.sum(), weights[0]])[None])


def test_lists_of_one_label_give_the_fractions_of_classes():
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(40, 5, generator=generator), torch.randn(6, 5, generator=generator)
    classes = torch.arange(40) % 3
    expected = knn_class_probs(keys, classes, queries, 3, k=7)
    probs = knn_label_probs(keys, classes[:, None] == torch.arange(3), queries, k=7)
    torch.testing.assert_close(probs, expected)


def test_probe_learns_independent_labels():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=generator)
    labels = features[:, :3] > torch.tensor([0.0, 0.5, -0.5])
    probe = MultiLabelProbe(features[:200], labels[:200].float(), 3, torch.arange(200))
    predicted = probe(features[200:]) > 0
    assert (predicted == labels[200:]).float().mean() > 0.95
    assert predicted.sum(1).float().mean() == pytest.approx(float(labels[200:].sum(1).float().mean()), abs=0.15)
