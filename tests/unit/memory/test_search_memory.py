"""Peak memory of searches in processes that keep freed blocks, as training processes do."""

import multiprocessing

import torch

from distav.distributed import process_group
from distav.memory.kmeans import nearest_centroids
from distav.memory.knn import nearest_neighbors
from tests.helpers.peak_memory import peak_growth

NUM_POINTS = 40_000
PRODUCTS, CANDIDATES = 2**21 * 4, 1024 * (50 + 2048) * 8
"""Bytes that a block of points needs while it is searched: products with all centroids; candidates of its queries."""


def measure() -> tuple[int, int]:
    """Return the growth of a comparison with centroids, and of an exact search of many queries."""
    torch.set_num_threads(1)
    process_group._keep_freed_memory()
    points = torch.randn(NUM_POINTS, 8, generator=torch.Generator().manual_seed(0))
    groups, valid = torch.arange(NUM_POINTS), torch.zeros(NUM_POINTS, dtype=torch.bool)
    valid[:4000] = True
    nearest_neighbors(points, 50, groups, valid, queries=groups[:100])  # One-time allocations of the libraries.
    return (
        peak_growth(lambda: nearest_centroids(points, points[:2048])),
        peak_growth(lambda: nearest_neighbors(points, 50, groups, valid)),
    )


def test_memory_of_a_block_is_used_again_for_the_next_one():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        centroids, neighbors = pool.apply(measure)
    assert centroids < 6 * PRODUCTS
    assert neighbors < 6 * CANDIDATES + NUM_POINTS * 50 * (8 + 12)  # Packed neighbors, and the result.
