"""Spherical k-means: centroids of directions. Legend: p points, D width, L clusters."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.memory.key_shard import MIN_GEMM_ROWS

ITERATIONS = 6
_BLOCK = 1024
"""Points that are compared with all centroids at a time."""


def fit_centroids(points: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Return centroids of unit length: [p, D] -> [L, D] float32.

    The first centroids are random points. A cluster without points gets the point that is farthest from its centroid.

    Args:
        points: [p, D] float32 of unit length, at least one for each cluster.
        num_clusters: L.
        seed: seed of the first centroids.
    """
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centroids = points[order.to(points.device)]
    for _ in range(ITERATIONS):
        clusters, similarity = nearest_centroids(points, centroids)
        sums = torch.zeros_like(centroids)
        for start in range(0, len(points), _BLOCK):
            part = slice(start, start + _BLOCK)
            # A matrix product, since the order of an addition by index is not defined on a GPU.
            members = points.new_zeros(len(points[part]), num_clusters).scatter_(1, clusters[part, None], 1.0)
            sums += members.t() @ points[part]
        empty = (torch.bincount(clusters, minlength=num_clusters) == 0).nonzero().squeeze(1)
        sums[empty] = points[similarity.argsort(stable=True)[: len(empty)]]
        # Points that cancel out leave their centroid where it was.
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 1e-6, F.normalize(sums, dim=1), centroids)
    return centroids


def nearest_centroids(
    points: Tensor, centroids: Tensor, map_parts: Callable[..., Iterator[None]] = map
) -> tuple[Tensor, Tensor]:
    """Return the centroid of largest dot product for each point, and this product: [p] int64 and [p] float32.

    A result does not depend on the other points.

    Args:
        points: [p, D] float32.
        centroids: [L, D] float32.
        map_parts: maps a function over blocks of points.
    """
    # Results that are allocated beside the products would keep glibc from reusing the memory of these.
    clusters = torch.empty(len(points), dtype=torch.int64, device=points.device)
    similarity = points.new_empty(len(points))

    def compare(start: int) -> None:
        part = slice(start, min(start + _BLOCK, len(points)))
        rows = F.pad(points[part], (0, 0, 0, max(0, MIN_GEMM_ROWS - part.stop + start)))
        largest = (rows @ columns).max(1)
        clusters[part], similarity[part] = (values[: part.stop - start] for values in (largest.indices, largest.values))

    missing = max(0, MIN_GEMM_ROWS - len(centroids))
    columns = torch.cat([centroids, centroids[:1].expand(missing, -1)]).t()
    for _ in map_parts(compare, range(0, len(points), _BLOCK)):
        pass
    return clusters.masked_fill_(clusters >= len(centroids), 0), similarity
