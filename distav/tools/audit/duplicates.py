"""Near-duplicates and exact copies among training clips, and clips that leak from training to test.

Legend: N training clips, M test clips, R = N + M rows, k neighbors, p pairs.
"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from distav.data.dataset import MEMBERS, Split
from distav.tools.audit.neighborhoods import Neighborhoods

EXPECTED_FALSE = 0.5
"""Expected number of clips without a duplicate that have a neighbor below the distance limit."""
MAX_RELATIVE_DISTANCE = 0.5
"""Largest limit of the distance to a duplicate, relative to the distance of the k-th neighbor."""
MAX_EXPECTED_IN_BOTH = 0.05
"""Largest expected number of neighbors in each modality of a pair that is a near-duplicate in both."""
MIN_CLIPS = 50
"""Number of clips from which near-duplicates are searched; with fewer, the distances have no reliable distribution."""
MIN_RELATIVE_RADIUS = 0.25
"""Smallest radius that a distance is compared with, relative to the median radius: a group of more than k copies has a
radius near zero."""
BOTH = "video and audio"
_DIMENSION_QUANTILE = 0.8
_BETTER = {("audio",): (BOTH, "video"), ("visual",): (BOTH,), ("visual", "audio"): ()}
"""Modalities of a near-duplicate that a copy in some modalities does not replace."""


@dataclass(frozen=True)
class Matches:
    """A training clip that each row duplicates.

    Attributes:
        ids: [R] int64 training clips, -1 for rows without a match.
        modalities: [R] object, what is duplicated: `video and audio`, `video`, `audio`, or empty without a match.
        cosines: [R] float32 cosine similarities in this modality, the lower one for both; 0 without a match.
        exact: [R] bool, whether the stored bytes are equal.
    """

    ids: np.ndarray
    modalities: np.ndarray
    cosines: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class DistanceModel:
    """How many neighbors as close as a given distance are expected around a clip that has no duplicate.

    Where the clips have a locally constant density in d dimensions, the ratio t of the distances to the nearest and to
    the k-th neighbor has the distribution 1 - (1 - t^d)^(k - 1), whatever the density is, and (k - 1) t^d neighbors
    are closer. A quantile of the ratios gives d (Levina and Bickel, 2004, estimate it from the same ratios); a high
    quantile is hardly affected by duplicates.

    Attributes:
        radii: [R] distance of the k-th neighbor of each row, at least `MIN_RELATIVE_RADIUS` of the median.
        dimension: d; None with fewer than `MIN_CLIPS` clips, where no near-duplicates are found.
        num_neighbors: k.
    """

    radii: np.ndarray
    dimension: float | None
    num_neighbors: int

    @classmethod
    def fit(cls, neighborhood: Neighborhoods) -> "DistanceModel":
        """Return the model of a modality."""
        k, known = neighborhood.ids.shape[1], neighborhood.known_radii
        distances = neighborhood.distances[: neighborhood.num_train]
        distances = distances[np.isfinite(distances[:, -1]) & (distances[:, -1] > 0)]
        if len(distances) < MIN_CLIPS or k < 2:
            return cls(neighborhood.radii, None, k)
        ratio = float(np.quantile(distances[:, 0] / distances[:, -1], _DIMENSION_QUANTILE).clip(1e-6, 1 - 1e-6))
        dimension = np.log(1 - (1 - _DIMENSION_QUANTILE) ** (1 / (k - 1))) / np.log(ratio)
        radii = np.maximum(neighborhood.radii, MIN_RELATIVE_RADIUS * np.median(known))
        return cls(radii, float(dimension), k)

    def expected_neighbors(self, rows: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """Return the expected number of neighbors of rows [p] within distances [p], at most 1: [p].

        It is 1 for distances above `MAX_RELATIVE_DISTANCE` of the radius.
        """
        radii = self.radii[rows]
        if self.dimension is None:
            return np.ones(len(rows))
        ratios = np.where(np.isfinite(radii) & np.isfinite(distances), distances / np.maximum(radii, 1e-12), np.inf)
        expected = (self.num_neighbors - 1) * np.minimum(ratios, 1.0) ** self.dimension
        return np.where(ratios <= MAX_RELATIVE_DISTANCE, np.minimum(expected, 1.0), 1.0)


def find_matches(
    neighborhoods: dict[str, Neighborhoods], train: Split, test: Split | None, excluded: dict[str, np.ndarray]
) -> Matches:
    """Find for each row a training clip that it is a copy or a near-duplicate of.

    A pair is a near-duplicate in a modality if fewer than `EXPECTED_FALSE` pairs as close are expected among all N
    clips without duplicates, and in both if this holds for both together and each is unusually close. Near-duplicates
    are of other sources: clips of one source are expected to resemble each other. Copies of the stored bytes are also
    found within a source. A match in both modalities is preferred, then one in the video.

    Args:
        neighborhoods: by modality.
        train: training split.
        test: test split, whose rows follow; None without one.
        excluded: training clips without content in a modality, such as silence: [N] bool by modality.
    """
    models = {name: DistanceModel.fit(neighborhood) for name, neighborhood in neighborhoods.items()}
    num_rows = len(neighborhoods["visual"].ids)
    matches = Matches(
        np.full(num_rows, -1),
        np.full(num_rows, "", dtype=object),
        np.zeros(num_rows, np.float32),
        np.zeros(num_rows, bool),
    )
    for name in neighborhoods:
        _add_near(matches, neighborhoods, models, name, EXPECTED_FALSE / max(1, len(train)))
    for modalities in (("audio",), ("visual",), ("visual", "audio")):
        _add_exact(matches, modalities, train, test, excluded)
    return matches


def _add_near(
    matches: Matches,
    neighborhoods: dict[str, Neighborhoods],
    models: dict[str, DistanceModel],
    name: str,
    limit: float,
) -> None:
    """Add near-duplicates among the neighbors in a modality.

    Args:
        matches: updated in place.
        neighborhoods: by modality.
        models: by modality.
        name: the modality.
        limit: expected number of neighbors below which a pair is a near-duplicate.
    """
    neighborhood, other = neighborhoods[name], "audio" if name == "visual" else "visual"
    rows, columns = (neighborhood.distances <= MAX_RELATIVE_DISTANCE * models[name].radii[:, None]).nonzero()
    ids = neighborhood.ids[rows, columns]
    exists = ids >= 0
    rows, ids = rows[exists], ids[exists]
    distances = {modality: neighborhoods[modality].pair_distances(rows, ids) for modality in neighborhoods}
    expected = {modality: models[modality].expected_neighbors(rows, distances[modality]) for modality in neighborhoods}
    is_unusual = np.maximum(expected[name], expected[other]) <= MAX_EXPECTED_IN_BOTH
    both = is_unusual & (expected[name] * expected[other] <= limit)
    pairs = (both | (expected[name] <= limit)).nonzero()[0]
    cosines = {modality: 1 - np.square(values) / 2 for modality, values in distances.items()}
    for pair in pairs[np.lexsort((distances[name][pairs], ~both[pairs]))].tolist():
        row = rows[pair]
        if matches.ids[row] < 0 or (both[pair] and matches.modalities[row] != BOTH):
            matches.ids[row] = ids[pair]
            matches.modalities[row] = BOTH if both[pair] else MEMBERS[name]
            matches.cosines[row] = min(cosines[name][pair], cosines[other][pair]) if both[pair] else cosines[name][pair]


def _add_exact(
    matches: Matches, modalities: tuple[str, ...], train: Split, test: Split | None, excluded: dict[str, np.ndarray]
) -> None:
    """Add copies: rows whose members of some modalities have the CRC-32 and size of those of a training clip."""
    splits = [train] + ([test] if test else [])
    columns = []
    valid = np.ones(sum(map(len, splits)), dtype=bool)
    for modality in modalities:
        for suffix in ("crc32", "bytes"):
            name = f"{MEMBERS[modality]}_{suffix}"
            columns.append(np.concatenate([split.columns[name] for split in splits]).astype(np.int64))
        valid &= columns[-1] > 0
        valid[: len(train)] &= ~excluded[modality]
    rows = valid.nonzero()[0]
    if not len(rows):
        return
    codes = np.unique(np.stack(columns, 1)[rows], axis=0, return_inverse=True)[1].ravel()
    order = np.argsort(codes, kind="stable")
    for members in np.split(rows[order], np.flatnonzero(np.diff(codes[order])) + 1):
        first, is_other = int(members[0]), members[1:]
        if not len(is_other) or first >= len(train):
            continue
        for row, match in [(first, int(is_other[0])), *((int(row), first) for row in is_other)]:
            if match >= len(train):
                continue
            if matches.modalities[row] in _BETTER[modalities]:
                continue
            matches.ids[row], matches.cosines[row], matches.exact[row] = match, 1.0, True
            matches.modalities[row] = " and ".join(MEMBERS[modality] for modality in modalities)


def duplicate_groups(ids: np.ndarray) -> np.ndarray:
    """Return the group of training clips that duplicate each other, [N] int64: its lowest id; -1 for other clips.

    Args:
        ids: [N] training clip that each training clip duplicates, -1 for none.
    """
    clips = (ids >= 0).nonzero()[0]
    links = coo_matrix((np.ones(len(clips)), (clips, ids[clips])), (len(ids), len(ids)))
    components = connected_components(links, directed=False)[1]
    lowest = np.full(components.max(initial=0) + 1, len(ids))
    np.minimum.at(lowest, components, np.arange(len(ids)))
    counts = np.bincount(components, minlength=len(lowest))
    return np.where(counts[components] > 1, lowest[components], -1)


@dataclass(frozen=True)
class Leaks:
    """Training and test clips that should not be in different splits.

    Attributes:
        partners: [R] int64 row of the other split, -1 without a leak.
        reasons: [R] object: `same source`, `copy`, `near-duplicate`, or empty.
        scores: [R] float32: 1 for a source or a copy, else the cosine similarity.
    """

    partners: np.ndarray
    reasons: np.ndarray
    scores: np.ndarray


def find_leaks(matches: Matches, train: Split, test: Split | None) -> Leaks:
    """Find clips of one source in both splits, and test clips that duplicate a training clip.

    All training clips of a group of duplicates leak if one of them does. A duplicate in the audio alone is no leak,
    since videos share music.
    """
    num_train, num_rows = len(train), len(matches.ids)
    leaks = Leaks(np.full(num_rows, -1), np.full(num_rows, "", dtype=object), np.zeros(num_rows, np.float32))
    if not test:
        return leaks
    rows = np.arange(num_train, num_rows)
    duplicated = rows[(matches.ids[rows] >= 0) & (matches.modalities[rows] != MEMBERS["audio"])]
    for row in duplicated[np.argsort(-matches.cosines[duplicated], kind="stable")].tolist():
        reason = "copy" if matches.exact[row] else "near-duplicate"
        _add_leak(leaks, row, int(matches.ids[row]), reason, float(matches.cosines[row]))
    _add_groups(leaks, matches, num_train)
    sources = np.concatenate([train.sources, test.sources]).astype(str)
    train_of = {source: clip for clip, source in reversed(list(enumerate(sources[:num_train].tolist())))}
    test_of = {source: num_train + clip for clip, source in reversed(list(enumerate(sources[num_train:].tolist())))}
    for row, source in enumerate(sources.tolist()):
        partner = (test_of if row < num_train else train_of).get(source)
        if partner is not None and leaks.partners[row] < 0:
            leaks.partners[row], leaks.reasons[row], leaks.scores[row] = partner, "same source", 1.0
    return leaks


def _add_groups(leaks: Leaks, matches: Matches, num_train: int) -> None:
    """Add the training clips that duplicate a training clip with a leak."""
    in_video = matches.modalities[:num_train] != MEMBERS["audio"]
    groups = duplicate_groups(np.where(in_video, matches.ids[:num_train], -1))
    leaking = (leaks.partners[:num_train] >= 0).nonzero()[0]
    leak_of_group = {int(groups[clip]): clip for clip in leaking[::-1].tolist() if groups[clip] >= 0}
    for clip in ((groups >= 0) & (leaks.partners[:num_train] < 0)).nonzero()[0].tolist():
        leak = leak_of_group.get(int(groups[clip]))
        if leak is not None:
            score = min(float(leaks.scores[leak]), float(matches.cosines[clip]))
            leaks.partners[clip], leaks.reasons[clip], leaks.scores[clip] = (
                leaks.partners[leak],
                "near-duplicate",
                score,
            )


def _add_leak(leaks: Leaks, test_row: int, train_row: int, reason: str, score: float) -> None:
    for row, partner in ((test_row, train_row), (train_row, test_row)):
        if leaks.partners[row] < 0:
            leaks.partners[row], leaks.reasons[row], leaks.scores[row] = partner, reason, score
