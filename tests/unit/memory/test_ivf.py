"""Approximate search in inverted lists, compared with the exact search."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.ivf import approximate_neighbors
from distav.memory.key_shard import Tiling
from distav.memory.kmeans import fit_centroids, nearest_centroids
from distav.memory.knn import nearest_neighbors


def mixture(num_samples: int, num_classes: int, width: int, spread: float, seed: int = 0) -> Tensor:
    """Return unit vectors around the means of classes: [num_samples, width]."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_classes, width, generator=generator)
    noise = torch.randn(num_samples, width, generator=generator)
    return F.normalize(means[torch.arange(num_samples) % num_classes] + spread * noise, dim=1)


def recall(exact: Tensor, found: Tensor) -> float:
    return sum(float(torch.isin(row, other).float().mean()) for row, other in zip(exact, found, strict=True)) / len(
        exact
    )


def test_probing_all_lists_equals_the_exact_search():
    """Also with groups, invalid samples, equal features, few queries, and keys that do not fill a product."""
    for num_samples, k, num_lists in ((7, 3, 2), (40, 39, 5), (500, 20, 22), (500, 20, 500)):
        features = mixture(num_samples, 4, 6, 0.5)
        features[num_samples // 2 :: 5] = features[0]
        groups, valid = torch.arange(num_samples) // 2, torch.arange(num_samples) % 7 != 3
        queries = torch.arange(0, num_samples, 3)
        arguments = features, k, groups, valid
        for tiling in (None, Tiling(64, 50), Tiling(64, 50, torch.float16)):
            exact = nearest_neighbors(*arguments, queries=queries, tiling=tiling)
            found = approximate_neighbors(*arguments, num_lists, queries=queries, tiling=tiling, num_lists=num_lists)
            assert all(map(torch.equal, exact, found))


def test_recall_rises_with_the_probes_and_similarities_are_exact():
    features = mixture(4000, 40, 32, 1.0)
    groups, valid = torch.arange(4000) // 3, torch.arange(4000) % 10 != 0
    exact, _ = nearest_neighbors(features, 40, groups, valid)
    recalls = []
    for probes in (16, 64):
        ids, similarity = approximate_neighbors(features, 40, groups, valid, probes)
        recalls.append(recall(exact[valid], ids[valid]))
        assert (groups[ids] != groups[:, None]).all() and valid[ids].all()
        products = torch.einsum("nd,nkd->nk", features, features[ids])
        torch.testing.assert_close(similarity, products, rtol=1e-5, atol=1e-6)
    assert recalls[0] > 0.75 and recalls[1] > 0.95


def test_samples_get_k_neighbors_even_if_the_nearest_lists_are_small():
    features, groups = mixture(900, 300, 16, 0.1), torch.arange(900)
    ids, _ = approximate_neighbors(features, 50, groups, groups >= 0, 1)
    assert (ids >= 0).all()


def test_the_result_depends_on_the_seed_alone():
    features, groups = mixture(2000, 30, 16, 1.0), torch.arange(2000)
    first, again, other = (
        approximate_neighbors(features, 20, groups, groups >= 0, 2, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(first, approximate_neighbors(features, 20, groups, groups >= 0, 2)[0])
    finally:
        torch.set_num_threads(threads)


def test_invalid_numbers_are_rejected():
    features, groups = mixture(20, 4, 6, 0.5), torch.arange(20)
    for options, message in (
        ({"num_probes": 0}, "num_probes=0; allowed: 1 or more"),
        ({"num_probes": 1, "num_lists": 0}, "num_lists=0; allowed: 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            approximate_neighbors(features, 3, groups, groups >= 0, **options)
    ids, similarity = approximate_neighbors(features, 3, groups, groups < 0, 2)
    assert (ids == -1).all() and not similarity.any()


def test_centroids_are_the_means_of_separate_clusters_and_no_cluster_is_empty():
    points = mixture(600, 6, 8, 0.05)
    centroids = fit_centroids(points, 12, seed=0)
    clusters, similarity = nearest_centroids(points, centroids)
    assert (torch.bincount(clusters, minlength=12) > 0).all()
    assert float(similarity.mean()) > 0.99
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(12))
    assert torch.equal(clusters[:5], nearest_centroids(points[:5], centroids)[0])
