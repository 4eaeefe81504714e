"""Metrics of corrected labels."""

import numpy as np
import pytest

from distav.evaluation.metrics import auroc, expected_calibration_error, label_accuracy


def test_calibration_error_of_known_probabilities():
    probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert expected_calibration_error(probs, np.array([0, 1, 0, 1])) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert expected_calibration_error(np.eye(3), np.arange(3)) == 0


def test_auroc_counts_ties_half_and_needs_both_classes():
    scores, positive = np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True])
    assert auroc(scores, positive) == pytest.approx(3.5 / 4)
    assert np.isnan(auroc(scores, np.ones(4, bool)))


def test_label_accuracy_before_and_after_correction():
    given, corrected, true = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    expected = {"given": 0.75, "corrected": 0.75, "wrong_labels_fixed": 1.0, "right_labels_broken": 1 / 3}
    assert label_accuracy(given, corrected, true) == pytest.approx(expected)
