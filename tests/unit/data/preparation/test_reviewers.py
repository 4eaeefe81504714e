"""Decisions of several reviewers: majority, ties, conflicts and agreement."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from distav.data.dataset import ShardedDataset
from distav.data.preparation.reviewers import (
    Conflict,
    Decisions,
    Review,
    format_review,
    measure_agreement,
    merge_decisions,
    read_decisions,
)
from distav.tools.make_shards import main
from tests.unit.data.preparation.test_cleaning import KEYS, labels_by_key, write_review


def merge(tiny_shards: Path, *reviewers: Decisions) -> Review:
    return merge_decisions(reviewers, ShardedDataset.open(tiny_shards).split("train"))


def test_the_majority_of_those_who_decided_is_applied_and_a_tie_changes_nothing(tiny_shards: Path):
    first = {0: {"label": "disc+tone", "pair": "matched"}, 1: {"label": "disc+tone"}, 2: {"action": "remove"}}
    second = {0: {"label": "disc+tone", "pair": "mismatched"}, 1: {"label": "bars+tone"}}
    third = {0: {"label": "bars+tone"}, 1: {}}
    review = merge(tiny_shards, first, second, third)
    assert review.merged == {0: {"label": "disc+tone", "pair": ""}, 1: {"label": ""}, 2: {"action": "remove"}}
    assert review.conflicts == [
        Conflict(KEYS[0], "label", ["disc+tone", "disc+tone", "bars+tone"], "disc+tone"),
        Conflict(KEYS[0], "pair", ["matched", "mismatched", ""], ""),
        Conflict(KEYS[1], "label", ["disc+tone", "bars+tone", ""], ""),
    ]
    rows = [re.split("  +", line) for line in format_review(review, 3, limit=2).splitlines()]
    assert rows[:2] == [["decided", "clips", "agreement, %", "Fleiss' kappa"], ["label", "2", "16.7", "-0.74"]]
    assert rows[4:] == [
        ["conflict", "decided", "reviewer 1", "reviewer 2", "reviewer 3", "result"],
        [KEYS[0], "label", "disc+tone", "disc+tone", "bars+tone", "majority: disc+tone"],
        [KEYS[0], "pair", "matched", "mismatched", "–", "tie: unchanged"],
        ["... 1 more conflicts"],
    ]


def test_kappa_of_two_reviewers_is_cohens():
    rng = np.random.default_rng(0)
    values = rng.choice(["a", "b", "c"], (2, 60), p=[0.5, 0.3, 0.2])
    values[1, :40] = values[0, :40]
    reviewers = [{clip: {"label": str(value)} for clip, value in enumerate(row)} for row in values]
    reviewers[0][99] = {"label": "a"}  # Decided by one reviewer alone.
    result = measure_agreement(reviewers, "label")
    assert result is not None and result.num_clips == 60 and result.kappa is not None
    assert result.kappa == pytest.approx(cohen_kappa_score(values[0], values[1]))
    assert result.percent == pytest.approx(100 * (values[0] == values[1]).mean())
    assert measure_agreement(reviewers, "pair") is None
    same = measure_agreement([{0: {"label": "a"}}, {0: {"label": "a"}}], "label")
    assert same is not None and same.percent == 100 and same.kappa is None


def test_kappa_of_more_reviewers_is_fleiss():
    """The example of Fleiss (1971) as in Wikipedia: 10 subjects, 14 raters, 5 categories, kappa 0.210."""
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
              [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    ratings = np.array([np.repeat(np.arange(5), row) for row in counts]).T
    reviewers = [{clip: {"label": f"c{value}"} for clip, value in enumerate(row)} for row in ratings]
    result = measure_agreement(reviewers, "label")
    assert result is not None and result.kappa == pytest.approx(0.210, abs=5e-4)


def test_clean_merges_the_files_of_reviewers_and_reports_conflicts(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = labels_by_key(ShardedDataset.open(tiny_shards))
    new = "disc+tone" if before[KEYS[0]] != "disc+tone" else "bars+tone"
    other = "cross+pulse"
    files = [
        write_review(tmp_path / "a.csv", key=KEYS[:3], label=[new, new, ""], action=["", "keep", "remove"]),
        write_review(tmp_path / "b.csv", key=KEYS[:3], label=[new, other, ""], action=["", "keep", "remove"]),
    ]
    arguments = ["clean", str(tiny_shards), str(tmp_path / "out"), "--workers=1", "--decisions", *map(str, files)]
    assert main(arguments) == 3
    after = ShardedDataset.open(tmp_path / "out")
    expected = {**before, KEYS[0]: new}
    del expected[KEYS[2]]
    assert labels_by_key(after) == expected
    output = capsys.readouterr().out
    rows = [re.split("  +", line) for line in output.splitlines()]
    assert ["decided", "clips", "agreement, %", "Cohen's kappa"] in rows
    assert ["label", "2", "50.0"] in [row[:3] for row in rows] and ["action", "2", "100.0"] in [row[:3] for row in rows]
    assert [KEYS[1], "label", new, other, "tie: unchanged"] in rows
    assert "removed by review" in (tmp_path / "out" / "rejected.csv").read_text()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["review"]["conflicts"][0]["key"] == KEYS[1]
    assert main(arguments) == 3 and "Cohen's kappa" in capsys.readouterr().out  # The dataset is complete.
    run = {"key": KEYS[:2], "corrected_label": [other] * 2, "confidence": [1.0] * 2}
    arguments[2] = str(tmp_path / "run")
    assert main([*arguments, "--labels", str(write_review(tmp_path / "run.csv", **run))]) == 3
    assert labels_by_key(ShardedDataset.open(tmp_path / "run")) == expected  # A tie precedes the table of the run.


def test_an_unknown_action_is_an_error_that_names_the_file_and_line(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = ShardedDataset.open(tiny_shards)
    good = write_review(tmp_path / "good.csv", key=KEYS[:1], label=[""], action=["keep"])
    bad = write_review(tmp_path / "bad.csv", key=KEYS[:1], label=[""], action=["delete"])
    assert read_decisions(good, shards.classes, shards.split("train")) == {0: {"action": "keep"}}
    assert main(["clean", str(tiny_shards), str(tmp_path / "out"), "--decisions", str(good), str(bad)]) == 1
    assert f"--decisions={bad}, line 2: action 'delete'; allowed: remove, keep, or empty." in capsys.readouterr().err
