"""Metrics of audio-visual events as LLP (Tian et al. 2020) and AVE (Tian et al. 2018) define them.

Legend: N videos, T segments of one second, C classes.
"""

import numpy as np

Counts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""True positives, false positives and false negatives, each [N, C]."""

MIN_IOU = 0.5
"""Intersection over union from which a predicted event matches a target event."""


def event_metrics(predicted: np.ndarray, target: np.ndarray) -> dict[str, dict[str, float]]:
    """Compute F1 scores of predicted events, per segment and per event.

    The score of a video is the mean F1 over the classes that are predicted or present in it, and 1 if there are none.
    The result is the mean over videos, which differs from macro F1 over the dataset.

    Args:
        predicted, target: [N, 2, T, C] bool; axis 1 is in the order of `distav.data.modalities.MODALITIES`.

    Returns:
        For `segment`, which compares seconds, and `event`, which compares contiguous events: `audio`, `visual`,
        `audio_visual` (audible and visible in the same second), `type` (Type@AV, the mean of these three) and `event`
        (Event@AV, F1 of the summed counts of both modalities), in percent.

    Raises:
        ValueError: if the shapes differ.
    """
    if predicted.shape != target.shape or predicted.ndim != 4 or predicted.shape[1] != 2:
        raise ValueError(
            f"predicted {predicted.shape} and target {target.shape} must have the same shape "
            "[videos, 2, segments, classes]"
        )
    pairs = [
        (predicted[:, 0], target[:, 0]),
        (predicted[:, 1], target[:, 1]),
        (predicted.all(axis=1), target.all(axis=1)),
    ]
    metrics: dict[str, dict[str, float]] = {}
    for level, count in (("segment", _count_segments), ("event", _count_events)):
        audio, visual, audio_visual = (count(*pair) for pair in pairs)
        scores = [_mean_f1(audio), _mean_f1(visual), _mean_f1(audio_visual)]
        summed = (audio[0] + visual[0], audio[1] + visual[1], audio[2] + visual[2])
        metrics[level] = {
            "audio": scores[0],
            "visual": scores[1],
            "audio_visual": scores[2],
            "type": sum(scores) / 3,
            "event": _mean_f1(summed),
        }
    return metrics


def segment_accuracy(predicted: np.ndarray, target: np.ndarray) -> float:
    """Return the fraction of segments with the correct event or background, in percent: [N, T] int64 twice."""
    return 100 * float((predicted == target).mean())


def predicted_events(audio: np.ndarray, visual: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Return the most probable audio-visual event of each segment, or background if none is probable.

    Args:
        audio, visual: [N, T, C] probabilities that a class is audible and visible, or bool.
        threshold: minimum product of both probabilities for an event.

    Returns:
        [N, T] int64 class numbers, C for background.
    """
    product = audio * visual
    return np.where(product.max(axis=2) >= threshold, product.argmax(axis=2), product.shape[2])


def _mean_f1(counts: Counts) -> float:
    true_positives, false_positives, false_negatives = counts
    total = 2 * true_positives + false_positives + false_negatives
    occurs = total > 0
    f1 = np.divide(2 * true_positives, total, out=np.zeros(total.shape), where=occurs)
    num_classes = occurs.sum(axis=1)
    videos = np.where(num_classes > 0, f1.sum(axis=1) / np.maximum(num_classes, 1), 1.0)
    return 100 * float(videos.mean())


def _count_segments(predicted: np.ndarray, target: np.ndarray) -> Counts:
    """Compare [N, T, C] second by second."""
    return (predicted & target).sum(axis=1), (predicted & ~target).sum(axis=1), (~predicted & target).sum(axis=1)


def _count_events(predicted: np.ndarray, target: np.ndarray) -> Counts:
    """Compare [N, T, C] event by event. A match is unique, since it covers at least half of both events."""
    (predicted_ids, predicted_lengths), (target_ids, target_lengths) = _events(predicted), _events(target)
    both = (predicted_ids >= 0) & (target_ids >= 0)
    pairs, overlap = np.unique(np.stack([predicted_ids[both], target_ids[both]]), axis=1, return_counts=True)
    union = predicted_lengths[pairs[0]] + target_lengths[pairs[1]] - overlap
    matched = pairs[0][overlap >= MIN_IOU * union]
    shape = predicted.shape[0], predicted.shape[2]
    num_rows, inside = shape[0] * shape[1], predicted_ids >= 0
    row_of = np.zeros(len(predicted_lengths), dtype=np.int64)
    row_of[predicted_ids[inside]] = np.broadcast_to(np.arange(num_rows)[:, None], predicted_ids.shape)[inside]
    true_positives = np.bincount(row_of[matched], minlength=num_rows).reshape(shape)
    num_predicted, num_target = _starts(predicted).sum(axis=1), _starts(target).sum(axis=1)
    return true_positives, num_predicted - true_positives, num_target - true_positives


def _events(present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the contiguous events in [N, T, C]; return the numbers [N * C, T], -1 outside, and the lengths."""
    rows = present.transpose(0, 2, 1).reshape(-1, present.shape[1])
    starts = _starts(present).transpose(0, 2, 1).reshape(rows.shape)
    numbers = np.where(rows, starts.ravel().cumsum().reshape(rows.shape) - 1, -1)
    return numbers, np.bincount(numbers[rows], minlength=0)


def _starts(present: np.ndarray) -> np.ndarray:
    """Return whether an event in [N, T, C] starts at this segment."""
    before = np.zeros_like(present)
    before[:, 1:] = present[:, :-1]
    return present & ~before
