"""Metrics of classifiers for several labels per clip: average precision, F1 and d-prime.

Legend: n clips, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtri

from distav.evaluation.metrics import auroc

THRESHOLD = 0.5
"""Probability from which a class is predicted."""
SCORE_NAMES = ("map", "f1_micro", "f1_macro", "d_prime")
"""Scores over all classes, in the order of reports."""


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean precision at the positives, in order of decreasing score; NaN without positives.

    Clips of equal score are ranked together: each has the precision after all of them.

    Args:
        scores: [n].
        positive: [n] bool.
    """
    if not positive.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], positive[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    group_hits = np.diff(hits[ends], prepend=0)
    return float((group_hits * hits[ends] / (ends + 1)).sum() / hits[-1])


@dataclass(frozen=True)
class MultiLabelScores:
    """Scores of a classifier on clips with several labels.

    Attributes:
        clips: [C] clips with each class.
        predictions: [C] clips for which each class is predicted.
        correct: [C] clips for which it is predicted correctly.
        average_precisions: [C] average precision of each class; NaN without clips.
        aurocs: [C] area under the ROC curve; NaN if all clips or none have the class.
        num_clips: n.
    """

    clips: np.ndarray
    predictions: np.ndarray
    correct: np.ndarray
    average_precisions: np.ndarray
    aurocs: np.ndarray
    num_clips: int

    @classmethod
    def of(cls, probs: np.ndarray, labels: np.ndarray) -> "MultiLabelScores":
        """Return the scores for the probabilities [n, C] and labels [n, C] bool of all clips."""
        predicted, columns = probs >= THRESHOLD, range(labels.shape[1])
        return cls(
            labels.sum(0),
            predicted.sum(0),
            (predicted & labels).sum(0),
            np.array([average_precision(probs[:, column], labels[:, column]) for column in columns]),
            np.array([auroc(probs[:, column], labels[:, column]) for column in columns]),
            len(labels),
        )

    @property
    def mean_average_precision(self) -> float:
        """Mean average precision over the classes that have clips (mAP, macro); NaN if none has."""
        return _mean(self.average_precisions)

    @property
    def chance(self) -> float:
        """Expected mAP of random scores: mean fraction of the clips that have a class, over classes with clips."""
        return _mean(np.where(self.clips > 0, self.clips / max(1, self.num_clips), np.nan))

    @property
    def f1_micro(self) -> float:
        """F1 score over all pairs of a clip and a class; NaN without labels and predictions."""
        total = int(self.clips.sum() + self.predictions.sum())
        return 2 * int(self.correct.sum()) / total if total else math.nan

    @property
    def f1_macro(self) -> float:
        """Mean F1 score of the classes that have clips; NaN if none has."""
        return _mean(np.where(self.clips > 0, self._f1, np.nan))

    @property
    def d_prime(self) -> float:
        """Sensitivity index sqrt(2) * Phi^-1(mean AUC), as reported for AudioSet; NaN without a defined AUC."""
        area = _mean(self.aurocs)
        return area if math.isnan(area) else float(math.sqrt(2) * ndtri(min(max(area, 1e-6), 1 - 1e-6)))

    @property
    def _f1(self) -> np.ndarray:
        """F1 score of each class, [C]; 0 without clips and predictions."""
        return 2 * self.correct / np.maximum(1, self.clips + self.predictions)

    def summary(self, suffix: str = "") -> dict[str, float]:
        """Return the defined scores of `SCORE_NAMES`; `suffix` is added to their names."""
        values = (self.mean_average_precision, self.f1_micro, self.f1_macro, self.d_prime)
        named = zip(SCORE_NAMES, values, strict=True)
        return {f"{name}{suffix}": value for name, value in named if not math.isnan(value)}

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return `clips`, `average_precision`, `recall`, `precision` and `f1` of each class; None if not defined."""
        result: dict[str, dict[str, Any]] = {}
        for column, name in enumerate(names):
            clips, predictions = int(self.clips[column]), int(self.predictions[column])
            correct = int(self.correct[column])
            result[name] = {
                "clips": clips,
                "average_precision": float(self.average_precisions[column]) if clips else None,
                "recall": correct / clips if clips else None,
                "precision": correct / predictions if predictions else None,
                "f1": float(self._f1[column]) if clips + predictions else None,
            }
        return result


def _mean(values: np.ndarray) -> float:
    """Return the mean of the values that are defined; NaN if none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def label_list_accuracy(given: np.ndarray, corrected: np.ndarray, true: np.ndarray) -> dict[str, float | None]:
    """Return the accuracy of label lists before and after correction, over all pairs of a clip and a class.

    Args:
        given, corrected, true: [N, C] bool.

    Returns:
        `given` and `corrected`, fractions of right pairs; `missing_labels_restored` and `wrong_labels_removed` of the
        missing and the wrong given labels; `right_labels_broken` of the right pairs; `f1_given` and `f1_corrected`, F1
        scores of the lists. None where there are no such labels.
    """
    right = corrected == true
    missing, wrong = true & ~given, given & ~true

    def fraction(values: np.ndarray, rows: np.ndarray) -> float | None:
        return float(values[rows].mean()) if rows.any() else None

    def f1(labels: np.ndarray) -> float | None:
        total = int(labels.sum() + true.sum())
        return 2 * int((labels & true).sum()) / total if total else None

    return {
        "given": float((given == true).mean()),
        "corrected": float(right.mean()),
        "missing_labels_restored": fraction(right, missing),
        "wrong_labels_removed": fraction(right, wrong),
        "right_labels_broken": fraction(~right, ~(missing | wrong)),
        "f1_given": f1(given),
        "f1_corrected": f1(corrected),
    }
