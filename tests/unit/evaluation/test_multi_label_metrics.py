"""Metrics of classifiers for several labels per clip, against direct computations."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from distav.evaluation.multi_label_metrics import MultiLabelScores, average_precision, label_list_accuracy


def test_average_precision_is_the_mean_precision_at_the_positives():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([True, False, True, False, True])
    assert average_precision(scores, positive) == pytest.approx((1 / 1 + 2 / 3 + 3 / 5) / 3)
    assert math.isnan(average_precision(scores, np.zeros(5, bool)))


def test_equal_scores_are_ranked_together_in_any_order():
    scores, positive = np.array([0.5, 0.5, 0.5, 0.9]), np.array([True, False, False, True])
    expected = (1 + 2 / 4) / 2
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        assert average_precision(scores[order], positive[order]) == pytest.approx(expected)
    constant = average_precision(np.zeros(10), np.arange(10) < 3)
    assert constant == pytest.approx(0.3)


def test_scores_of_several_classes():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], bool)
    probs = np.array([[0.9, 0.2, 0.1], [0.4, 0.8, 0.6], [0.6, 0.7, 0.2], [0.1, 0.1, 0.3]])
    scores = MultiLabelScores.of(probs, labels)
    first = (1 + 2 / 3) / 2
    assert scores.mean_average_precision == pytest.approx((first + 1) / 2)
    assert scores.chance == pytest.approx(0.5)
    # Class 0: 1 of 2 found, 2 predicted. Class 1: 2 of 2, 2 predicted. Class 2: without clips, 1 predicted.
    assert scores.f1_micro == pytest.approx(2 * 3 / (4 + 5)) and scores.f1_macro == pytest.approx((0.5 + 1) / 2)
    area = (0.75 + 1) / 2
    assert scores.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(area))
    by_class = scores.by_class(["a", "b", "c"])
    assert by_class["a"] == {"clips": 2, "average_precision": first, "recall": 0.5, "precision": 0.5, "f1": 0.5}
    assert by_class["c"] == {"clips": 0, "average_precision": None, "recall": None, "precision": 0.0, "f1": 0.0}
    assert scores.summary("_audio").keys() == {"map_audio", "f1_micro_audio", "f1_macro_audio", "d_prime_audio"}


def test_clips_without_labels_have_no_map():
    scores = MultiLabelScores.of(np.zeros((2, 3)), np.zeros((2, 3), bool))
    assert scores.summary() == {}


def test_accuracy_of_label_lists():
    true = np.array([[1, 1], [1, 0], [0, 0]], bool)
    given = np.array([[1, 0], [1, 1], [0, 0]], bool)
    corrected = np.array([[1, 1], [1, 1], [1, 0]], bool)
    assert label_list_accuracy(given, corrected, true) == {
        "given": pytest.approx(4 / 6),
        "corrected": pytest.approx(4 / 6),
        "missing_labels_restored": 1.0,
        "wrong_labels_removed": 0.0,
        "right_labels_broken": pytest.approx(1 / 4),
        "f1_given": pytest.approx(4 / 6),
        "f1_corrected": pytest.approx(6 / 8),
    }
    assert label_list_accuracy(true, true, true)["missing_labels_restored"] is None
