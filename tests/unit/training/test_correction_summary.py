"""Report entry and metrics of a label correction."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from distav.data.annotations.labels import Labels
from distav.noise.correction import Correction, identity_correction
from distav.noise.noise_rate import RateEstimate
from distav.training.phases.correction_summary import (
    CorrectionResult,
    _log_line,
    build_summary,
    calibration_error,
    correction_warning,
)

GIVEN, TRUE, PAIR_ID = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1]), np.array([0, 2, 1, 3])


def make_correction(has_signal: bool) -> Correction:
    matrix = torch.tensor([[0.9, 0.1, 2.0], [0.2, 0.8, 2.0]], dtype=torch.float64)
    correction = identity_correction(torch.from_numpy(GIVEN), 2)
    return replace(
        correction,
        label_rate=RateEstimate(0.5, 0.4, 0.6),
        transition_matrix=matrix,
        log_likelihood_gain=12.34,
        has_signal=has_signal,
        selected_votes={"visual": "towers"},
    )


RESULT = CorrectionResult(
    corrected=np.array([0, 1, 0, 0]),
    change_odds=2.5,
    knn_labels=np.array([0, 1, 0, 0]),
    confidence=np.array([0.9, 0.8, 0.7, 0.6], dtype=np.float32),
    self_confidence=np.array([0.9, 0.8, 0.3, 0.6], dtype=np.float32),
    correspondence=np.array([0.9, 0.1, 0.6, 0.8], dtype=np.float32),
    calibration_errors={"ece_held_out": 0.1, "ece_posterior": 0.2},
)


def test_summary_with_ground_truth():
    labels = Labels(["a", "b"], GIVEN, TRUE, PAIR_ID)
    summary = build_summary("correction", labels, make_correction(has_signal=True), RESULT)
    assert summary["phase"] == "correction" and summary["selected_votes"] == {"visual": "towers"}
    assert summary["log_likelihood_gain"] == 12.3 and summary["changed_fraction"] == 0.25
    assert summary["change_odds"] == 2.5
    assert summary["changed_confidence"] == pytest.approx(0.7)
    assert summary["warning"].startswith(
        "the changed labels have a mean confidence of 70%: about 30% of the changes are probably wrong."
    )
    assert summary["label_noise_rate"] == {"estimate": 0.5, "ci95_low": 0.4, "ci95_high": 0.6}
    rates = summary["label_noise_rate_by_class"]
    assert {label: rate["estimate"] for label, rate in rates.items()} == {"a": 0.1, "b": 0.2}
    assert summary["label_accuracy"] == {
        "given": 0.5,
        "corrected": 0.75,
        "wrong_labels_fixed": 0.5,
        "right_labels_broken": 0.0,
        "ece_held_out": 0.1,
        "ece_posterior": 0.2,
    }
    # Samples 1 and 2 are mismatched; one of their correspondences is below the threshold.
    assert summary["pair_auroc"] == {"other_class": 1.0, "swapped": 1.0}
    assert summary["noise_confusion"]["counts"] == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]


def test_summary_without_ground_truth_and_without_signal():
    labels, result = Labels(["a", "b"], GIVEN), replace(RESULT, corrected=GIVEN, calibration_errors={})
    summary = build_summary("correction", labels, make_correction(has_signal=False), result)
    assert summary["changed_fraction"] == 0 and summary["label_noise_rate_by_class"] == {}
    assert summary["changed_confidence"] is None
    assert summary.keys().isdisjoint({"warning", "label_accuracy", "pair_auroc", "noise_confusion"})


def test_log_lines_say_why_labels_are_kept():
    summary = {"phase": "second", "log_likelihood_gain": 2.0, "selected_votes": {"visual": "towers"}}
    line = _log_line(summary, has_signal=False, min_gain=10.0)
    assert line.startswith(
        "phase=second k-NN votes carry no label signal (log-likelihood gain 2.0 nats, threshold 10.0)"
    )
    assert "more epochs" in line
    line = _log_line(summary | {"selected_votes": {}}, has_signal=False, min_gain=10.0)
    assert line.startswith("phase=second keeps the given labels: a phase trained on them") and "k-NN" not in line


@pytest.mark.parametrize(
    ("confidence", "accuracy", "parts"),
    [
        (0.95, {"given": 0.6, "corrected": 0.9}, ()),
        (0.95, None, ()),
        (None, {"given": 0.6, "corrected": 0.6}, ()),
        (0.95, {"given": 0.6, "corrected": 0.41}, ("less accurate (41.0%) than the given labels (60.0%)",)),
        (0.66, None, ("mean confidence of 66%: about 34% of the changes",)),
        (0.5, {"given": 0.6, "corrected": 0.5}, ("less accurate (50.0%)", "about 50% of the changes")),
    ],
)
def test_an_unreliable_correction_is_reported(
    confidence: float | None, accuracy: dict[str, float] | None, parts: tuple[str, ...]
):
    summary = {"changed_confidence": confidence} | ({"label_accuracy": accuracy} if accuracy else {})
    warning = correction_warning(summary)
    assert (warning is not None) == bool(parts)
    for part in (*parts, "Train the phases before this correction for more epochs") if parts else ():
        assert part in str(warning)


def test_calibration_error_is_computed_from_the_confidences():
    probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]])
    assert calibration_error(probs, np.array([0, 1, 0, 1])) == pytest.approx(0.4)
