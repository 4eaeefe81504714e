from pathlib import Path

import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.annotations.ave import HEADER, read_ave
from distav.evaluation.event_metrics import predicted_events, segment_accuracy


def test_published_annotations_are_complete(real_data: Path):
    annotations = read_ave(real_data / "ave" / "Annotations.txt")
    weak, segments = annotations.weak, annotations.segments
    assert len(annotations.names) == 4143 and len(annotations.classes) == 28 and len(set(annotations.names)) == 4097
    assert annotations.classes[int(weak[0])] == "Church bell" and (segments[0] == weak[0]).all()
    assert (segments[1] == 28).sum() == 8 and (segments[1, 6:8] == weak[1]).all()
    assert ((segments != 28).all(axis=1)).sum() == 2750


def test_header_is_skipped(tmp_path: Path):
    path = tmp_path / "Annotations.txt"
    path.write_text(f"{HEADER}\nBark&x&good&2&5\n")
    assert read_ave(path).segments.tolist() == [[1, 1, 0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("line", ["Bark&y&good&2&11", "Bark&y&good&5&2", "Bark&y&good&&2", "Bark&y&good&2&x", "Bark&y"])
def test_invalid_line_is_reported(tmp_path: Path, line: str):
    path = tmp_path / "Annotations.txt"
    path.write_text(f"Bark&x&good&2&5\n{line}\n")
    with pytest.raises(UserError, match=f"line 2: '{line}' is not of the form Category&"):
        read_ave(path)


def test_missing_file_is_reported(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_ave(tmp_path / "none.txt")


def test_predicted_event_is_both_audible_and_visible():
    audio = np.array([[[0.9, 0.1], [0.9, 0.8], [0.6, 0.6]]])
    visual = np.array([[[0.8, 0.9], [0.1, 0.9], [0.6, 0.7]]])
    predicted = predicted_events(audio, visual)
    assert predicted.tolist() == [[0, 1, 2]]
    assert segment_accuracy(predicted, np.array([[0, 1, 1]])) == pytest.approx(200 / 3)
