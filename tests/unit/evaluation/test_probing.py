import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from distav.evaluation.probing import LinearProbe, LinearSVM, MultiLabelSVM, knn_class_probs


def blobs(seed: int, count: int, num_classes: int = 3, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(0, 1, (num_classes, width))
    classes = rng.integers(0, num_classes, count)
    return torch.from_numpy(centers[classes] + rng.normal(0, 1, (count, width))).float(), torch.from_numpy(classes)


def test_weighted_fractions_equal_those_of_brute_force():
    keys, classes = blobs(0, 40)
    keys[5] = 0
    queries, _ = blobs(1, 7)
    probs = knn_class_probs(keys, classes, queries, 3, k=4, temperature=0.1)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2)
    cosines[:, 5] = -2
    for row in range(7):
        expected = torch.zeros(3)
        for neighbor in cosines[row].argsort(descending=True)[:4]:
            expected[classes[neighbor]] += (cosines[row, neighbor] / 0.1).exp()
        torch.testing.assert_close(probs[row], expected / expected.sum())
    assert torch.allclose(knn_class_probs(keys, classes, queries, 3, k=1000).sum(1), torch.ones(7))


def test_every_view_of_a_clip_has_the_same_weight_in_the_votes():
    # The neighbors of the first view are equally near, those of the second one are not.
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    probs = knn_class_probs(keys, torch.tensor([0, 0, 1, 1]), torch.eye(2), 2, k=2, temperature=0.1)
    assert probs.mean(0).tolist() == pytest.approx([0.5, 0.5])


def test_the_probe_finds_the_minimum_of_another_solver():
    inputs, classes = blobs(0, 300)
    probe = LinearProbe(inputs, classes, 3, torch.arange(300))
    standardized = ((inputs - probe.mean) / probe.std).numpy()
    # scikit-learn minimizes the sum of the losses and not their mean, and half the squares.
    reference = LogisticRegression(C=1 / (2 * probe.penalty * 300), tol=1e-8, max_iter=5000).fit(
        standardized, classes.numpy()
    )
    expected = torch.from_numpy(reference.predict_proba(standardized)).float()
    torch.testing.assert_close(probe(inputs).softmax(1), expected, atol=2e-3, rtol=0)
    test, target = blobs(1, 500)
    assert (probe(test).argmax(1) == target).float().mean() > 0.8


def test_the_svm_finds_the_minimum_of_another_solver():
    inputs, classes = blobs(0, 300)
    svm = LinearSVM(inputs, classes, 3, torch.arange(300))
    standardized = ((inputs - svm.mean) / svm.std).numpy()
    # The intercept is regularized by scikit-learn unless its scale is large.
    reference = LinearSVC(C=1 / (2 * svm.penalty * 300), tol=1e-6, max_iter=100_000, intercept_scaling=1000).fit(
        standardized, classes.numpy()
    )
    expected = torch.from_numpy(reference.decision_function(standardized)).float()
    torch.testing.assert_close(svm.scores(inputs), expected, atol=5e-3, rtol=0)
    lists = torch.nn.functional.one_hot(classes, 3).float()
    multiple = MultiLabelSVM(inputs, lists, 3, torch.arange(300))
    assert multiple.penalty == svm.penalty
    torch.testing.assert_close(multiple.scores(inputs), svm.scores(inputs).sigmoid(), atol=1e-3, rtol=0)


def test_noise_features_increase_the_penalty():
    rng = torch.Generator().manual_seed(0)
    clean, classes = blobs(0, 400)
    noise = torch.randn(400, 300, generator=rng)
    groups = torch.arange(400) // 2
    clean_penalty = LinearProbe(clean, classes, 3, groups).penalty
    assert LinearProbe(torch.cat([clean, noise], 1), classes, 3, groups).penalty > clean_penalty
