"""Off-topic clips: training clips of none of the classes, far from all other clips.

Legend: N training clips.
"""

import numpy as np

from distav.tools.audit.neighborhoods import Neighborhoods

MIN_SELF_CONFIDENCE = 0.5
"""Probability of the given label, by the votes of the neighbors, from which they support it."""
MIN_NEIGHBORS, MAX_NEIGHBORS = 3, 10
"""Limits of the number of supported neighbors that the radius of a clip reaches to."""
MIN_CLIPS = 50
"""Number of supported clips from which off-topic clips are searched."""
LOW_QUANTILE = 0.1587
"""Fraction of a normal distribution that is more than one standard deviation below its center."""
MIN_DEVIATION = 2.05
"""Standard deviations above the center from which a clip is unusually far: 2 % of the ordinary clips, in one modality
and before their labels are used."""


def is_supported(self_confidence: np.ndarray, predicts_given: np.ndarray) -> np.ndarray:
    """Return the clips whose given label their neighbors support, [N] bool.

    Args:
        self_confidence: [N] probability of the given label under held-out votes.
        predicts_given: [N] bool, whether the votes predict the given label.
    """
    return predicts_given & (self_confidence >= MIN_SELF_CONFIDENCE)


def num_neighbors(labels: np.ndarray, supported: np.ndarray) -> int:
    """Return the number of neighbors for off-topic scores: half the supported clips of a typical class, within limits.

    With more, the neighbors of a clip would be of other classes.

    Args:
        labels: [N] given labels.
        supported: [N] result of `is_supported`.
    """
    counts = np.unique(labels[supported], return_counts=True)[1]
    return int(np.clip(np.median(counts) // 2 if len(counts) else 0, MIN_NEIGHBORS, MAX_NEIGHBORS))


def off_topic_scores(neighborhoods: dict[str, Neighborhoods], supported: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far each training clip is from the supported clips, and whether it is off-topic.

    The radius of a clip is compared with the radii of its nearest supported clips, so that classes may differ in
    density (a local outlier factor; Breunig et al., 2000). A clip is off-topic if its label is not supported and the
    logarithm of this ratio is unusually large in each modality that the clip has; center and spread come from the lower
    half of the ratios, which off-topic clips hardly affect. Off-topic clips that resemble each other do not hide each
    other, since unsupported clips are no neighbors.

    Args:
        neighborhoods: by modality, with supported clips as neighbors.
        supported: [N] result of `is_supported`.

    Returns:
        Scores [N] float32, one minus the inverse of the ratio in the modality where it is smaller, at least 0, and
        whether the clip is off-topic, [N] bool.
    """
    num_clips = len(supported)
    deviations, scores = np.full((2, num_clips), np.inf), np.full((2, num_clips), np.inf)
    for index, neighborhood in enumerate(neighborhoods.values()):
        radii, ids = neighborhood.radii[:num_clips], neighborhood.ids[:num_clips]
        rows = np.isfinite(radii) & (radii > 0)
        if (rows & supported).sum() < MIN_CLIPS:
            continue
        local = np.median(np.where(np.isfinite(radii), radii, np.nan)[ids[rows]], axis=1)
        ratios = np.log(radii[rows]) - np.log(np.maximum(local, 1e-6))
        low, median = np.quantile(ratios, [LOW_QUANTILE, 0.5])
        deviations[index, rows] = (ratios - median) / max(median - low, 1e-6)
        scores[index, rows] = 1 - np.exp(-ratios)
    known = np.isfinite(deviations).any(0)
    score = np.where(known, scores.min(0).clip(0), 0.0)
    return score.astype(np.float32), known & (deviations.min(0) > MIN_DEVIATION) & ~supported
