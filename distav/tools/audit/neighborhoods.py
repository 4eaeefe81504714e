"""Neighborhoods of clips in the features of the network: the nearest training clips and their distances.

Rows are the N training clips, then the M test clips. Each search is exact, and a distance does not depend on the block
or the rank that computes it.
Legend: N training clips, M test clips, R = N + M rows, k neighbors, E width, p pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch

from distav.evaluation.embedding import Embeddings, normalize_rows
from distav.memory.knn import nearest_neighbors

NUM_NEIGHBORS = 10
"""Number of neighbors that describe the density around a clip."""
_PAIR_BLOCK = 4096


@dataclass(frozen=True)
class Neighborhoods:
    """The nearest training clips of each row in one modality, without clips of the row's own source.

    Attributes:
        rows: [R, E] float32 unit vectors.
        exists: [R] bool, whether a row has the modality.
        num_train: N.
        ids: [R, k] int64 training clips by increasing distance, -1 where there are fewer.
        distances: [R, k] float32 Euclidean distances between the unit vectors, infinite where there are fewer.
    """

    rows: np.ndarray
    exists: np.ndarray
    num_train: int
    ids: np.ndarray
    distances: np.ndarray

    @property
    def radii(self) -> np.ndarray:
        """Distance of the farthest neighbor of each row: [R], infinite where there are fewer than k."""
        return self.distances[:, -1]

    @property
    def known_radii(self) -> np.ndarray:
        """Finite radii of training clips: [up to N]."""
        radii = self.radii[: self.num_train]
        return radii[np.isfinite(radii)]

    def pair_distances(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return the distances between rows [p] and rows [p]; infinite if one of them lacks the modality."""
        distances = np.full(len(first), np.inf, dtype=np.float32)
        for start in range(0, len(first), _PAIR_BLOCK):
            part = slice(start, start + _PAIR_BLOCK)
            products = (self.rows[first[part]] * self.rows[second[part]]).sum(1)
            distances[part] = _distances(products)
        distances[~(self.exists[first] & self.exists[second])] = np.inf
        return distances


def find_neighborhoods(
    train: Embeddings,
    sources: np.ndarray,
    test: Embeddings | None = None,
    excluded: dict[str, np.ndarray] | None = None,
    candidates: np.ndarray | None = None,
    k: int = NUM_NEIGHBORS,
) -> dict[str, Neighborhoods]:
    """Find the nearest training clips of all training and test clips in each modality.

    Args:
        train: embeddings of the training clips.
        sources: [N] int64 source of each training clip; clips of one source are not neighbors of each other.
        test: embeddings of the test clips, whose neighbors may be of any source.
        excluded: training clips without content in a modality, such as silence: [N] bool by modality.
        candidates: training clips that may be neighbors, [N] bool; all of them if None.
        k: number of neighbors.

    Returns:
        Neighborhoods by modality, `visual` and `audio`.
    """
    num_train, num_test = len(sources), len(test.visual) if test else 0
    groups = np.concatenate([sources, np.arange(num_test) + sources.max(initial=0) + 1])
    is_candidate = np.arange(len(groups)) < num_train
    if candidates is not None:
        is_candidate[:num_train] &= candidates
    k = min(k, len(groups) - 1)
    neighborhoods: dict[str, Neighborhoods] = {}
    for modality in ("visual", "audio"):
        parts = [part for part in (train, test) if part]
        rows = normalize_rows(np.concatenate([getattr(part, modality) for part in parts])).astype(np.float32)
        exists = np.concatenate([part.modality(modality) for part in parts]) & (np.linalg.norm(rows, axis=1) > 0)
        if excluded:
            exists[:num_train] &= ~excluded[modality]
        ids = np.full((len(rows), max(k, 1)), -1)
        distances = np.full((len(rows), max(k, 1)), np.inf, dtype=np.float32)
        queries = exists.nonzero()[0]
        if k > 0 and len(queries):
            found, cosines = nearest_neighbors(
                torch.from_numpy(rows),
                k,
                torch.from_numpy(groups),
                torch.from_numpy(exists & is_candidate),
                queries=torch.from_numpy(queries),
            )
            ids[queries] = found.numpy()
            distances[queries] = np.where(found.numpy() < 0, np.inf, _distances(cosines.numpy()))
        neighborhoods[modality] = Neighborhoods(rows, exists, num_train, ids, distances)
    return neighborhoods


def _distances(cosines: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(2 - 2 * cosines, 0)).astype(np.float32)
