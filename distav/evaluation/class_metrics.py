"""Accuracy, balanced accuracy and the scores of each class, from counts that add up over batches and ranks.

Legend: n clips, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def class_counts(predicted: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Return for each class the clips classified correctly, all clips, and the predictions: [3, C] float64.

    Args:
        predicted: [n] int64 predicted classes.
        classes: [n] int64 classes of the clips.
        num_classes: C.
    """
    columns = classes[predicted == classes], classes, predicted
    return torch.stack([torch.bincount(column, minlength=num_classes) for column in columns]).double()


@dataclass(frozen=True)
class ClassScores:
    """Scores of a classifier.

    Attributes:
        correct: [C] clips of each class that are classified correctly.
        clips: [C] clips of each class.
        predictions: [C] clips that are classified as each class.
    """

    correct: list[int]
    clips: list[int]
    predictions: list[int]

    @classmethod
    def of(cls, counts: Tensor) -> "ClassScores":
        """Return the scores for the counts of `class_counts`, summed over batches and ranks: [3, C]."""
        return cls(*counts.long().tolist())

    @property
    def accuracy(self) -> float:
        """Fraction of all clips that are classified correctly; NaN without clips."""
        return sum(self.correct) / sum(self.clips) if sum(self.clips) else float("nan")

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall over the classes that have clips; NaN without clips."""
        recalls = [correct / clips for correct, clips in zip(self.correct, self.clips, strict=True) if clips]
        return sum(recalls) / len(recalls) if recalls else float("nan")

    def by_class(self, names: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
        """Return `clips`, `recall`, `precision` and `f1` of each class by name.

        The recall of a class without clips, the precision of a class that is never predicted, and the F1 score of a
        class with neither are None.
        """
        return {
            name: {
                "clips": clips,
                "recall": correct / clips if clips else None,
                "precision": correct / predictions if predictions else None,
                "f1": 2 * correct / (clips + predictions) if clips + predictions else None,
            }
            for name, correct, clips, predictions in zip(names, self.correct, self.clips, self.predictions, strict=True)
        }
