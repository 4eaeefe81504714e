"""Scores of event parsing against the values that the published annotations give, and against plain loops."""

import time
from pathlib import Path

import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.annotations.llp import CLASSES, read_llp
from distav.evaluation.event_metrics import event_metrics

NAMES = ("audio", "visual", "audio_visual", "type", "event")
ANCHORS = {
    "truth": ([100] * 5, [100] * 5),
    "nothing": ([0.50, 10.08, 14.50, 8.36, 0.00], [0.50, 10.08, 14.50, 8.36, 0.00]),
    "weak": ([76.12, 60.35, 52.61, 63.03, 71.73], [63.03, 55.75, 44.69, 54.49, 61.60]),
    "weak, heard": ([76.12, 10.08, 14.50, 33.57, 58.59], [63.03, 10.08, 14.50, 29.20, 46.45]),
    "weak, seen": ([0.50, 60.35, 14.50, 25.12, 43.15], [0.50, 55.75, 14.50, 23.58, 36.92]),
    "by modality": ([80.14, 89.80, 82.78, 84.24, 81.96], [66.11, 83.69, 71.41, 73.74, 68.27]),
    "everything": ([5.38, 4.16, 3.52, 4.35, 5.07], [4.31, 3.79, 2.93, 3.68, 4.25]),
}
ANCHORS_VAL = {
    "nothing": ([0.62, 10.79, 14.33, 8.58, 0.00], [0.62, 10.79, 14.33, 8.58, 0.00]),
    "weak": ([77.07, 58.65, 52.07, 62.60, 71.53], [63.85, 53.48, 44.15, 53.82, 61.12]),
}


def told(name: str, weak: np.ndarray, true: np.ndarray) -> np.ndarray:
    everywhere = np.broadcast_to(weak[:, None, None], true.shape)
    return {
        "truth": true,
        "nothing": np.zeros_like(true),
        "weak": everywhere,
        "weak, heard": everywhere & np.array([True, False])[None, :, None, None],
        "weak, seen": everywhere & np.array([False, True])[None, :, None, None],
        "by modality": np.broadcast_to(true.any(axis=2, keepdims=True), true.shape),
        "everything": np.ones_like(true),
    }[name]


@pytest.mark.parametrize(
    ("split", "name"), [*(("test", name) for name in ANCHORS), *(("val", name) for name in ANCHORS_VAL)]
)
def test_annotations_score_what_they_are_known_to(real_data: Path, split: str, name: str):
    read = read_llp(real_data / "llp", split)
    assert read.events is not None
    found = event_metrics(told(name, read.weak, read.events), read.events)
    expected = (ANCHORS if split == "test" else ANCHORS_VAL)[name]
    for level, values in zip(("segment", "event"), expected, strict=True):
        assert [found[level][each] for each in NAMES] == pytest.approx(values, abs=0.0051), level


def test_the_published_splits_are_read_whole(real_data: Path):
    read = {split: read_llp(real_data / "llp", split) for split in ("train", "val", "test")}
    assert [len(each.names) for each in read.values()] == [10_000, 649, 1200]
    assert not set(read["train"].names) & set(read["test"].names)
    assert [each.weak.sum(1).mean() for each in read.values()] == pytest.approx([1.61, 1.80, 1.82], abs=0.0051)
    of_class = dict(zip(CLASSES, read["train"].weak.sum(axis=0), strict=True))
    assert of_class["Speech"] == 4988 and of_class["Telephone_bell_ringing"] == 99
    events = read["test"].events
    assert events is not None and read["train"].events is None
    heard, seen = events[:, 0], events[:, 1]
    assert [(heard & seen).sum(), (heard & ~seen).sum(), (~heard & seen).sum()] == [9592, 4984, 2197]
    assert (~(heard & seen).any(axis=(1, 2))).sum() == 174


def test_1200_videos_are_scored_in_less_than_a_second():
    rng = np.random.default_rng(0)
    told_, true = (rng.random((1200, 2, 10, 25)) < 0.2 for _ in range(2))
    began = time.process_time()
    event_metrics(told_, true)
    assert time.process_time() - began < 1


def runs(row: np.ndarray) -> list[set[int]]:
    found: list[set[int]] = []
    for second in np.flatnonzero(row):
        if found and second - 1 in found[-1]:
            found[-1].add(int(second))
        else:
            found.append({int(second)})
    return found


def by_loops(told_: np.ndarray, true: np.ndarray, events: bool) -> list[float]:
    scores: list[list[float]] = []
    for video, truth in zip(told_, true, strict=True):
        counts = []
        for ours, theirs in [*zip(video, truth, strict=True), (video.all(0), truth.all(0))]:
            table = []
            for c in range(true.shape[3]):
                if events:
                    a, b = runs(ours[:, c]), runs(theirs[:, c])
                    close = [[len(x & y) / len(x | y) >= 0.5 for y in b] for x in a]
                    hit = sum(any(row) for row in close)
                    table.append((hit, len(a) - hit, sum(not any(row[k] for row in close) for k in range(len(b)))))
                else:
                    a, b = ours[:, c], theirs[:, c]
                    table.append((int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())))
            counts.append(np.array(table))
        values = []
        for table in [*counts, counts[0] + counts[1]]:
            f = [2 * hit / (2 * hit + wrong + missed) for hit, wrong, missed in table if hit + wrong + missed]
            values.append(np.mean(f) if f else 1.0)
        scores.append([*values[:3], np.mean(values[:3]), values[3]])
    return [100 * value for value in np.mean(scores, axis=0)]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_scores_are_those_of_loops(share: float):
    rng = np.random.default_rng(3)
    told_, true = (rng.random((40, 2, 10, 6)) < share for _ in range(2))
    found = event_metrics(told_, true)
    for level in ("segment", "event"):
        assert [found[level][name] for name in NAMES] == pytest.approx(by_loops(told_, true, level == "event"))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 2, 10, 4\) and true \(3, 2, 9, 4\)"):
        event_metrics(np.zeros((3, 2, 10, 4), bool), np.zeros((3, 2, 9, 4), bool))


def test_faults_of_the_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="split tests: LLP has train, val, test. Did you mean 'test'"):
        read_llp(tmp_path, "tests")
    with pytest.raises(UserError, match="AVVP_val_pd.csv: no such file"):
        read_llp(tmp_path, "val")
    path = tmp_path / "AVVP_train.csv"
    path.write_text("filename,event_labels\nx,Dog\n")
    with pytest.raises(UserError, match="no column 'event_labels'"):
        read_llp(tmp_path, "train")
    path.write_text("filename\tevent_labels\nx\tDogg\n")
    with pytest.raises(UserError, match="'Dogg' is no class of LLP. Did you mean 'Dog'"):
        read_llp(tmp_path, "train")
