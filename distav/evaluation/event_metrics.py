"""Scores of audio-visual events, as LLP (Tian et al. 2020) and AVE (Tian et al. 2018) define them.

Legend: N videos, T segments of one second, C classes.
"""

import numpy as np

Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""True positives, false positives and false negatives, each [N, C]."""

OVERLAP = 0.5
"""Intersection over union from which two events are the same."""


def event_metrics(predicted: np.ndarray, target: np.ndarray) -> dict[str, dict[str, float]]:
    """Score which events are heard and seen, and when.

    A video's score is the mean F1 over the classes that occur in it, told or true, and 1 where none does; a score is
    the mean over the videos. That is no macro F1 over the set.

    Args:
        told, true: [N, 2, T, C] bool, heard first, then seen.

    Returns:
        For `segment`, which compares seconds, and `event`, which compares unbroken stretches: `audio`, `visual`,
        `audio_visual` (heard and seen at once), `type` (Type@AV, the mean of these three) and `event` (Event@AV, F1 of
        the counts of heard and seen together), in percent.

    Raises:
        ValueError: where the shapes differ.
    """
    if predicted.shape != target.shape or predicted.ndim != 4 or predicted.shape[1] != 2:
        raise ValueError(
            f"told {predicted.shape} and true {target.shape} have to be [videos, 2, segments, classes] alike"
        )
    kinds = [
        (predicted[:, 0], target[:, 0]),
        (predicted[:, 1], target[:, 1]),
        (predicted.all(axis=1), target.all(axis=1)),
    ]
    found = {}
    for level, count in (("segment", _count_segments), ("event", _count_events)):
        audio, visual, both = (count(*kind) for kind in kinds)
        scores = [_score(each) for each in (audio, visual, both)]
        together = tuple(heard + seen for heard, seen in zip(audio, visual, strict=True))
        names = ("audio", "visual", "audio_visual", "type", "event")
        values = (*scores, sum(scores) / 3, _score(together))  # pyright: ignore[reportArgumentType]
        found[level] = dict(zip(names, values, strict=True))
    return found


def segment_accuracy(predicted: np.ndarray, target: np.ndarray) -> float:
    """Return the share of segments whose event, or background, is right, in percent: [N, T] int64 twice."""
    return 100 * float((predicted == target).mean())


def predicted_events(heard: np.ndarray, seen: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Return the event of each segment: the likeliest one to be heard and seen, background where none is likely.

    Args:
        heard, seen: [N, T, C] probabilities, or whether it is so.
        threshold: smallest product of both that is an event.

    Returns:
        [N, T] int64, C for background.
    """
    both = heard * seen
    return np.where(both.max(axis=2) >= threshold, both.argmax(axis=2), both.shape[2])


def _score(counts: Counts) -> float:
    hit, wrong, missed = counts
    total = 2 * hit + wrong + missed
    occurs = total > 0
    f1 = np.divide(2 * hit, total, out=np.zeros(total.shape), where=occurs)
    classes = occurs.sum(axis=1)
    videos = np.where(classes > 0, f1.sum(axis=1) / np.maximum(classes, 1), 1.0)
    return 100 * float(videos.mean())


def _count_segments(predicted: np.ndarray, target: np.ndarray) -> Counts:
    """Compare [N, T, C] second by second."""
    return (predicted & target).sum(axis=1), (predicted & ~target).sum(axis=1), (~predicted & target).sum(axis=1)


def _count_events(predicted: np.ndarray, target: np.ndarray) -> Counts:
    """Compare [N, T, C] event by event; no two events share a match, since each needs half of both."""
    (ours, lengths), (theirs, true_lengths) = _events(predicted), _events(target)
    both = (ours >= 0) & (theirs >= 0)
    pairs, shared = np.unique(np.stack([ours[both], theirs[both]]), axis=1, return_counts=True)
    union = lengths[pairs[0]] + true_lengths[pairs[1]] - shared
    matched = pairs[0][shared >= OVERLAP * union]
    shape = predicted.shape[0], predicted.shape[2]
    row_of = np.zeros(len(lengths), dtype=np.int64)
    row_of[ours[ours >= 0]] = np.broadcast_to(np.arange(shape[0] * shape[1])[:, None], ours.shape)[ours >= 0]
    hit = np.bincount(row_of[matched], minlength=shape[0] * shape[1]).reshape(shape)
    return hit, _starts(predicted).sum(axis=1) - hit, _starts(target).sum(axis=1) - hit


def _events(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the unbroken stretches of [N, T, C]: their numbers [N * C, T], -1 outside, and their lengths."""
    rows = present.transpose(0, 2, 1).reshape(-1, present.shape[1])
    starts = _starts(present).transpose(0, 2, 1).reshape(rows.shape)
    numbers = np.where(rows, starts.ravel().cumsum().reshape(rows.shape) - 1, -1)
    return numbers, np.bincount(numbers[rows], minlength=0)


def _starts(present: np.ndarray) -> np.ndarray:
    """Where events of [N, T, C] begin."""
    before = np.zeros_like(present)
    before[:, 1:] = present[:, :-1]
    return present & ~before
