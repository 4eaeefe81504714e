"""The annotations of AVE (Audio-Visual Event localization; Tian et al. 2018): one event a video, both heard and seen.

Legend: N videos, T segments of one second, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distav.config.errors import UserError

DURATION_S = 10
HEADER = "Category&VideoID&Quality&StartTime&EndTime"


@dataclass(frozen=True)
class AVEAnnotations:
    """The set, in the order of its file.

    Attributes:
        names: YouTube ids; a few occur twice, with other events.
        classes: names of the events, sorted.
        weak: [N] int64, the event of each video.
        segments: [N, T] int64, the event of each second, C where there is none (background).
    """

    names: list[str]
    classes: list[str]
    weak: np.ndarray
    segments: np.ndarray


def read_ave(path: Path) -> AVEAnnotations:
    """Read `Annotations.txt` as published, with or without its header.

    Raises:
        UserError: for a missing file, or a line that is none of AVE's, with its number.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give AVE's Annotations.txt.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line == HEADER:
            continue
        parts = line.split("&")
        if len(parts) != 5 or not (parts[3] + parts[4]).isdigit() or not 0 <= int(parts[3]) <= int(parts[4]) <= DURATION_S:
            raise UserError(f"{path}, line {number}: '{line[:80]}' is not of the form {HEADER}, with seconds up to 10.")
        rows.append((parts[1], parts[0], int(parts[3]), int(parts[4])))
    classes = sorted({row[1] for row in rows})
    weak = np.array([classes.index(row[1]) for row in rows], dtype=np.int64)
    segments = np.full((len(rows), DURATION_S), len(classes), dtype=np.int64)
    for number, (_, _, first, end) in enumerate(rows):
        segments[number, first:end] = weak[number]
    return AVEAnnotations([row[0] for row in rows], classes, weak, segments)
