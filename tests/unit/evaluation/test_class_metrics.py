"""Scores of each class and balanced accuracy against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support

from distav.evaluation.class_metrics import ClassScores, class_counts

NAMES = ["a", "b", "c", "d", "e"]


def test_scores_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    classes = torch.multinomial(torch.tensor([16.0, 4, 2, 1]), 300, replacement=True, generator=generator)
    noisy = torch.rand(300, generator=generator) < 0.4
    predicted = torch.where(noisy, torch.randint(0, 4, (300,), generator=generator), classes)
    # Counts of parts add up, as over batches and ranks.
    counts = sum(class_counts(predicted[part], classes[part], 4) for part in torch.arange(300).split(70))
    assert isinstance(counts, torch.Tensor)
    scores = ClassScores.of(counts)
    assert scores.accuracy == pytest.approx(float((predicted == classes).double().mean()))
    assert scores.balanced_accuracy == pytest.approx(balanced_accuracy_score(classes, predicted))
    precision, recall, f1, clips = map(np.asarray, precision_recall_fscore_support(classes, predicted, average=None))
    for number, values in enumerate(scores.by_class(NAMES[:4]).values()):
        expected = {"clips": clips[number], "recall": recall[number], "precision": precision[number], "f1": f1[number]}
        assert values == pytest.approx(expected)


def test_classes_without_clips_or_predictions():
    classes, predicted = torch.tensor([0, 0, 0, 1, 3, 3]), torch.tensor([0, 0, 2, 0, 3, 0])
    scores = ClassScores.of(class_counts(predicted, classes, 5))
    with warnings.catch_warnings(action="ignore"):  # The prediction of a class without clips.
        expected = balanced_accuracy_score(classes, predicted)
    assert scores.balanced_accuracy == pytest.approx(expected) == pytest.approx((2 / 3 + 0 + 1 / 2) / 3)
    assert scores.by_class(NAMES) == {
        "a": {"clips": 3, "recall": 2 / 3, "precision": 2 / 4, "f1": 4 / 7},
        "b": {"clips": 1, "recall": 0.0, "precision": None, "f1": 0.0},
        "c": {"clips": 0, "recall": None, "precision": 0.0, "f1": 0.0},
        "d": {"clips": 2, "recall": 0.5, "precision": 1.0, "f1": 2 / 3},
        "e": {"clips": 0, "recall": None, "precision": None, "f1": None},
    }


def test_without_clips_there_is_no_accuracy():
    none = torch.zeros(0, dtype=torch.int64)
    scores = ClassScores.of(class_counts(none, none, 3))
    assert math.isnan(scores.accuracy) and math.isnan(scores.balanced_accuracy)
