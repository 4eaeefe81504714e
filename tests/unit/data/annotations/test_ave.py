from pathlib import Path

import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.annotations.ave import HEADER, read_ave
from distav.evaluation.event_metrics import predicted_events, segment_accuracy


def test_the_published_annotations_are_read_whole(real_data: Path):
    read = read_ave(real_data / "ave" / "Annotations.txt")
    assert len(read.names) == 4143 and len(read.classes) == 28 and len(set(read.names)) == 4097
    assert read.classes[int(read.weak[0])] == "Church bell" and (read.segments[0] == read.weak[0]).all()
    assert (read.segments[1] == 28).sum() == 8 and (read.segments[1, 6:8] == read.weak[1]).all()
    assert ((read.segments != 28).all(axis=1)).sum() == 2750


def test_a_header_is_passed_over_and_other_lines_are_named(tmp_path: Path):
    path = tmp_path / "Annotations.txt"
    path.write_text(f"{HEADER}\nBark&x&good&2&5\n")
    assert read_ave(path).segments.tolist() == [[1, 1, 0, 0, 0, 1, 1, 1, 1, 1]]
    path.write_text("Bark&x&good&2&5\nBark&y&good&2&11\n")
    with pytest.raises(UserError, match=r"line 2: 'Bark&y&good&2&11' is not of the form Category&"):
        read_ave(path)
    with pytest.raises(UserError, match="no such file"):
        read_ave(tmp_path / "none.txt")


def test_an_event_is_what_is_both_heard_and_seen():
    heard = np.array([[[0.9, 0.1], [0.9, 0.8], [0.6, 0.6]]])
    seen = np.array([[[0.8, 0.9], [0.1, 0.9], [0.6, 0.7]]])
    told = predicted_events(heard, seen)
    assert told.tolist() == [[0, 1, 2]]
    assert segment_accuracy(told, np.array([[0, 1, 1]])) == pytest.approx(200 / 3)
