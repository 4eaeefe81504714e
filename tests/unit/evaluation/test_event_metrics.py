"""Event metrics against values that follow from the published annotations, and against plain loops."""

import time
from pathlib import Path

import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.annotations.llp import CLASSES, read_llp
from distav.evaluation.event_metrics import event_metrics

NAMES = ("audio", "visual", "audio_visual", "type", "event")
ANCHORS = {
    "target": ([100] * 5, [100] * 5),
    "nothing": ([0.50, 10.08, 14.50, 8.36, 0.00], [0.50, 10.08, 14.50, 8.36, 0.00]),
    "weak": ([76.12, 60.35, 52.61, 63.03, 71.73], [63.03, 55.75, 44.69, 54.49, 61.60]),
    "weak, audio": ([76.12, 10.08, 14.50, 33.57, 58.59], [63.03, 10.08, 14.50, 29.20, 46.45]),
    "weak, visual": ([0.50, 60.35, 14.50, 25.12, 43.15], [0.50, 55.75, 14.50, 23.58, 36.92]),
    "by modality": ([80.14, 89.80, 82.78, 84.24, 81.96], [66.11, 83.69, 71.41, 73.74, 68.27]),
    "everything": ([5.38, 4.16, 3.52, 4.35, 5.07], [4.31, 3.79, 2.93, 3.68, 4.25]),
}
ANCHORS_VAL = {
    "nothing": ([0.62, 10.79, 14.33, 8.58, 0.00], [0.62, 10.79, 14.33, 8.58, 0.00]),
    "weak": ([77.07, 58.65, 52.07, 62.60, 71.53], [63.85, 53.48, 44.15, 53.82, 61.12]),
}


def prediction(name: str, weak: np.ndarray, target: np.ndarray) -> np.ndarray:
    everywhere = np.broadcast_to(weak[:, None, None], target.shape)
    return {
        "target": target,
        "nothing": np.zeros_like(target),
        "weak": everywhere,
        "weak, audio": everywhere & np.array([True, False])[None, :, None, None],
        "weak, visual": everywhere & np.array([False, True])[None, :, None, None],
        "by modality": np.broadcast_to(target.any(axis=2, keepdims=True), target.shape),
        "everything": np.ones_like(target),
    }[name]


@pytest.mark.parametrize(
    ("split", "name"), [*(("test", name) for name in ANCHORS), *(("val", name) for name in ANCHORS_VAL)]
)
def test_trivial_predictions_have_known_metrics(real_data: Path, split: str, name: str):
    read = read_llp(real_data / "llp", split)
    assert read.events is not None
    metrics = event_metrics(prediction(name, read.weak, read.events), read.events)
    expected = (ANCHORS if split == "test" else ANCHORS_VAL)[name]
    for level, values in zip(("segment", "event"), expected, strict=True):
        assert [metrics[level][metric] for metric in NAMES] == pytest.approx(values, abs=0.0051), level


def test_the_published_splits_are_read_completely(real_data: Path):
    read = {split: read_llp(real_data / "llp", split) for split in ("train", "val", "test")}
    assert [len(split.names) for split in read.values()] == [10_000, 649, 1200]
    assert not set(read["train"].names) & set(read["test"].names)
    assert [split.weak.sum(1).mean() for split in read.values()] == pytest.approx([1.61, 1.80, 1.82], abs=0.0051)
    class_counts = dict(zip(CLASSES, read["train"].weak.sum(axis=0), strict=True))
    assert class_counts["Speech"] == 4988 and class_counts["Telephone_bell_ringing"] == 99
    events = read["test"].events
    assert events is not None and read["train"].events is None
    audio, visual = events[:, 0], events[:, 1]
    assert [(audio & visual).sum(), (audio & ~visual).sum(), (~audio & visual).sum()] == [9592, 4984, 2197]
    assert (~(audio & visual).any(axis=(1, 2))).sum() == 174


def test_metrics_of_1200_videos_take_less_than_a_second():
    rng = np.random.default_rng(0)
    predicted, target = (rng.random((1200, 2, 10, 25)) < 0.2 for _ in range(2))
    start = time.process_time()
    event_metrics(predicted, target)
    assert time.process_time() - start < 1


def contiguous(row: np.ndarray) -> list[set[int]]:
    events: list[set[int]] = []
    for second in np.flatnonzero(row):
        if events and second - 1 in events[-1]:
            events[-1].add(int(second))
        else:
            events.append({int(second)})
    return events


def by_loops(predicted: np.ndarray, target: np.ndarray, events: bool) -> list[float]:
    scores: list[list[float]] = []
    for predicted_video, target_video in zip(predicted, target, strict=True):
        counts = []
        pairs = [*zip(predicted_video, target_video, strict=True), (predicted_video.all(0), target_video.all(0))]
        for predicted_segments, target_segments in pairs:
            table = []
            for c in range(target.shape[3]):
                if events:
                    a, b = contiguous(predicted_segments[:, c]), contiguous(target_segments[:, c])
                    match = [[len(x & y) / len(x | y) >= 0.5 for y in b] for x in a]
                    hit = sum(any(row) for row in match)
                    table.append((hit, len(a) - hit, sum(not any(row[k] for row in match) for k in range(len(b)))))
                else:
                    a, b = predicted_segments[:, c], target_segments[:, c]
                    table.append((int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())))
            counts.append(np.array(table))
        values = []
        for table in [*counts, counts[0] + counts[1]]:
            f = [2 * hit / (2 * hit + wrong + missed) for hit, wrong, missed in table if hit + wrong + missed]
            values.append(np.mean(f) if f else 1.0)
        scores.append([*values[:3], np.mean(values[:3]), values[3]])
    return [100 * value for value in np.mean(scores, axis=0)]


@pytest.mark.parametrize("density", [0.05, 0.3, 0.7])
def test_metrics_equal_those_of_loops(density: float):
    rng = np.random.default_rng(3)
    predicted, target = (rng.random((40, 2, 10, 6)) < density for _ in range(2))
    metrics = event_metrics(predicted, target)
    for level in ("segment", "event"):
        assert [metrics[level][name] for name in NAMES] == pytest.approx(by_loops(predicted, target, level == "event"))


def test_different_shapes_are_rejected():
    with pytest.raises(ValueError, match=r"\(3, 2, 10, 4\) and target \(3, 2, 9, 4\)"):
        event_metrics(np.zeros((3, 2, 10, 4), bool), np.zeros((3, 2, 9, 4), bool))


def test_errors_in_the_files_are_reported(tmp_path: Path):
    with pytest.raises(UserError, match="split tests: LLP has train, val, test. Did you mean 'test'"):
        read_llp(tmp_path, "tests")
    with pytest.raises(UserError, match="AVVP_val_pd.csv: no such file"):
        read_llp(tmp_path, "val")
    path = tmp_path / "AVVP_train.csv"
    path.write_text("filename,event_labels\nx,Dog\n")
    with pytest.raises(UserError, match="line 1: the columns are separated by commas"):
        read_llp(tmp_path, "train")
    path.write_text("filename\tevent_labels\nx\tDogg\n")
    with pytest.raises(UserError, match="'Dogg' is not a class of LLP. Did you mean 'Dog'"):
        read_llp(tmp_path, "train")
