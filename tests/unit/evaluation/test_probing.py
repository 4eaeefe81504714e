import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from distav.evaluation.probing import LinearProbe, knn_class_probs


def blobs(seed: int, count: int, num_classes: int = 3, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (num_classes, width))
    classes = rng.integers(0, num_classes, count)
    return torch.from_numpy(centres[classes] + rng.normal(0, 1, (count, width))).float(), torch.from_numpy(classes)


def test_votes_are_those_of_brute_force():
    keys, classes = blobs(0, 40)
    keys[5] = 0
    queries, _ = blobs(1, 7)
    votes = knn_class_probs(keys, classes, queries, 3, k=4, temperature=0.1)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], keys[None], dim=2)
    cosines[:, 5] = -2
    for row in range(7):
        expected = torch.zeros(3)
        for place in cosines[row].argsort(descending=True)[:4]:
            expected[classes[place]] += ((cosines[row, place] - cosines[row].max()) / 0.1).exp()
        torch.testing.assert_close(votes[row], expected)
    assert knn_class_probs(keys, classes, queries, 3, k=1000).sum() > 0


def test_the_probe_finds_the_minimum_that_another_solver_finds():
    inputs, classes = blobs(0, 300)
    probe = LinearProbe(inputs, classes, 3, torch.arange(300))
    standard = ((inputs - probe.mean) / probe.std).numpy()
    # scikit-learn adds up losses where this takes their mean, and halves the squares.
    other = LogisticRegression(C=1 / (2 * probe.penalty * 300), tol=1e-8, max_iter=5000).fit(standard, classes.numpy())
    theirs = torch.from_numpy(other.predict_proba(standard)).float()
    torch.testing.assert_close(probe(inputs).softmax(1), theirs, atol=2e-3, rtol=0)
    test, truth = blobs(1, 500)
    assert (probe(test).argmax(1) == truth).float().mean() > 0.8


def test_more_noise_asks_for_more_penalty():
    rng = torch.Generator().manual_seed(0)
    clean, classes = blobs(0, 400)
    noise = torch.randn(400, 300, generator=rng)
    groups = torch.arange(400) // 2
    alone = LinearProbe(clean, classes, 3, groups).penalty
    assert LinearProbe(torch.cat([clean, noise], 1), classes, 3, groups).penalty > alone
