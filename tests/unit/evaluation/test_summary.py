"""Metrics of an evaluation as tables."""

import re

from distav.evaluation.summary import format_metrics, over_folds


def fold(accuracy: float, d_prime: float = 1.234) -> dict:
    knn = {"top1_visual": accuracy, "map_visual": 0.5, "top1_both": 0.25, "map_both": 0.125}
    zero_shot = {"top1_audio": 1.0, "d_prime_audio": d_prime}
    directions = {f"{name}_{metric}": 0.1 for name in ("v2a", "a2v") for metric in ("recall@1", "map")}
    return {"data": "a", "metrics": {"knn": knn, "zero_shot": zero_shot, "retrieval": directions | {"rsum": 20.0}}}


def cells(text: str) -> list[list[str]]:
    return [re.split("  +", line) for line in text.splitlines()]


def test_tables_have_a_row_for_each_task_and_modality():
    assert cells(format_metrics(over_folds([fold(0.75)]))) == [
        ["task", "modality", "top1, %", "map, %", "d_prime"],
        ["knn", "visual", "75.0", "50.0"],
        ["knn", "both", "25.0", "12.5"],
        ["zero_shot", "audio", "100.0", "1.23"],
        [""],
        ["retrieval", "recall@1, %", "map, %"],
        ["video to audio", "10.0", "10.0"],
        ["audio to video", "10.0", "10.0"],
        ["rSum 20.0 of 600"],
    ]


def test_several_folds_have_standard_deviations():
    rows = cells(format_metrics(over_folds([fold(0.75, 1.0), fold(0.25, 2.0)])))
    assert rows[0] == ["Mean ± standard deviation over 2 folds:"]
    assert rows[3] == ["knn", "visual", "50.0 ± 35.4", "50.0 ± 0.0"]
    assert rows[5] == ["zero_shot", "audio", "100.0 ± 0.0", "1.50 ± 0.71"]
    assert rows[-1] == ["rSum 20.0 ± 0.0 of 600"]


def test_retrieval_without_clips_of_both_modalities_is_reported():
    results = over_folds([{"metrics": {"retrieval": {}}}])
    assert format_metrics(results) == "retrieval: not possible, since no test clip has both modalities"
