"""The summary that is printed at the end of a run."""

from pathlib import Path
from typing import Any

import pytest

from distav.training.report import format_summary

FOLDER = Path("runs/tiny")


def rate(estimate: float, low: float, high: float) -> dict[str, float]:
    return {"estimate": estimate, "ci95_low": low, "ci95_high": high}


def report(**entries: Any) -> dict[str, Any]:
    phases = [{"seconds": 12.25}, {"seconds": 7.5}]
    return {"samples": 96, "phases": phases, "quarantined_samples": [], **entries}


def correction(label_rate: dict[str, float], pair_rate: dict[str, float]) -> dict[str, Any]:
    return {
        "phase": "second_round",
        "changed_fraction": 0.125,
        "label_noise_rate": label_rate,
        "pair_mismatch_rate": pair_rate,
    }


def test_summary_of_a_run_with_ground_truth():
    accuracy = {"given": 0.6, "corrected": 0.95, "wrong_labels_fixed": 0.931, "right_labels_broken": 0.01}
    test: dict[str, Any] = {
        "top1": 0.9,
        "top1_visual": 0.8,
        "top1_audio": 0.7,
        "v2a_map": 0.451,
        "a2v_map": 0.44,
        "rsum": 212.34,
    }
    test["by_class"] = {"both": {"cat": {"clips": 12}, "dog": {"clips": 15}}}
    content = report(
        given_labels_by_class={"cat": 40, "dog": 56},
        label_accuracy=accuracy,
        correspondence_auroc=0.9531,
        test=test,
        corrections=[correction(rate(0.401, 0.38, 0.42), rate(0.2, 0.1, 0.3))],
    )
    assert format_summary(content, FOLDER, 5, has_signal=True).splitlines() == [
        "",
        "Done: 96 training clips, 20 s of training.",
        "  Labels:     accuracy 60.0 % -> 95.0 % (93.1 % of wrong labels fixed, 1.0 % of right labels broken)",
        "  Pairs:      mismatched-audio detection AUROC 0.953",
        "  Test:       top-1 90.0 % (video and audio), 80.0 % (video only), 70.0 % (audio only); chance 20.0 %",
        "  Retrieval:  mAP video-to-audio 45.1 %, audio-to-video 44.0 %; rSum 212.3 / 600",
        "  Noise:      label noise rate 40.1 % (95 % interval 38.0 % to 42.0 %)",
        "  Noise:      pair mismatch rate 20.0 % (95 % interval 10.0 % to 30.0 %)",
        "  Label file: runs/tiny/labels/second_round.parquet",
        "  Network:    runs/tiny/export",
        "  Metrics:    tensorboard --logdir runs/tiny",
        "  Report:     runs/tiny/report.json",
    ]


@pytest.mark.parametrize(
    ("given", "tested", "sizes"),
    [([480, 5], [10, 10], "5 to 480"), ([48, 48], [20, 10], "48 to 48"), ([9, 0], [5, 0], "0 to 9")],
)
def test_summary_of_imbalanced_classes(given: list[int], tested: list[int], sizes: str):
    test: dict[str, Any] = {
        "top1": 0.9,
        "top1_visual": 0.8,
        "balanced_accuracy": 0.4123,
        "balanced_accuracy_visual": 0.3,
    }
    test["by_class"] = {"both": {name: {"clips": clips} for name, clips in zip(("cat", "dog"), tested, strict=True)}}
    content = report(test=test, given_labels_by_class=dict(zip(("cat", "dog"), given, strict=True)))
    lines = format_summary(content, FOLDER, 2, has_signal=False).splitlines()
    assert lines[2:4] == [
        "  Test:       top-1 90.0 % (video and audio), 80.0 % (video only); chance 50.0 %",
        "  Classes:    balanced accuracy 41.2 % (video and audio), 30.0 % (video only); "
        f"{sizes} training clips per class",
    ]


def test_summary_without_ground_truth_reports_the_changed_labels_and_quarantined_clips():
    content = report(
        corrections=[correction(rate(0.5, 0.1, 0.9), rate(0.2, 0.1, 0.3))],
        quarantined_samples=[{"id": 3, "key": "clip", "reason": "CRC-32"}],
        test={"top1": 0.9, "by_class": {"both": {"cat": {"clips": 12}, "dog": {"clips": 15}}}},
        given_labels_by_class={"cat": 40, "dog": 56},
    )
    summary = format_summary(content, FOLDER, 5, has_signal=True)
    assert "90.0 % (video and audio); chance 20.0 %; by the given labels, which are not corrected\n" in summary
    assert "  Labels:     12.5 % of the given labels changed by correction\n" in summary
    assert "  Noise:      label noise rate not identified (95 % interval 10.0 % to 90.0 %)\n" in summary
    assert "  Quarantine: 1 clip could not be read or decoded\n" in summary


def test_summary_without_a_label_signal_reports_no_noise_rates():
    content = report(corrections=[correction(rate(0.5, 0.1, 0.9), rate(0.2, 0.1, 0.3))])
    summary = format_summary(content, FOLDER, 5, has_signal=False)
    assert "  Noise:      not estimated: k-NN votes carry no label signal, the given labels are kept; train" in summary
    assert "rate" not in summary


def test_summary_repeats_the_warning_of_the_last_correction():
    last = correction(rate(0.4, 0.3, 0.5), rate(0.2, 0.1, 0.3)) | {"warning": "the changed labels are doubtful."}
    summary = format_summary(report(corrections=[last]), FOLDER, 5, has_signal=True)
    assert "  Warning:    the changed labels are doubtful.\n" in summary


def test_summary_of_event_parsing():
    levels = {"audio": 60.04, "visual": 58.0, "audio_visual": 50.0, "type": 56.0, "event": 57.5}
    summary = format_summary(report(events={"segment": levels, "event": levels}), FOLDER, 5, has_signal=False)
    line = (
        "  Events:     segment-level F1 audio 60.0, visual 58.0, Type@AV 56.0, Event@AV 57.5; event-level F1 "
        "Type@AV 56.0, Event@AV 57.5\n"
    )
    assert line in summary
