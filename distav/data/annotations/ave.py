"""Annotations of AVE (Audio-Visual Event localization; Tian et al. 2018): one audible and visible event per video.

Legend: N videos, T segments of one second, C classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distav.config.errors import UserError
from distav.data.annotations.tables import read_utf8

DURATION_S = 10
HEADER = "Category&VideoID&Quality&StartTime&EndTime"


@dataclass(frozen=True)
class AVEAnnotations:
    """All annotated videos, in the order of the file.

    Attributes:
        names: YouTube ids; a few occur twice, with different events.
        classes: event classes, sorted by name.
        weak: [N] int64, class of the event of each video.
        segments: [N, T] int64, class of each second; C where there is no event (background).
    """

    names: list[str]
    classes: list[str]
    weak: np.ndarray
    segments: np.ndarray


def read_ave(path: Path) -> AVEAnnotations:
    """Read the published `Annotations.txt`, with or without its header.

    Raises:
        UserError: for a missing file, or a line that does not have AVE's format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give AVE's Annotations.txt.")
    rows = []
    for number, line in enumerate(read_utf8(path, str(path)).splitlines(), start=1):
        if line == HEADER:
            continue
        fields = line.split("&")
        if len(fields) != 5 or not _is_interval(*fields[3:]):
            raise UserError(
                f"{path}, line {number}: '{line[:80]}' is not of the form {HEADER} with whole seconds from 0 to "
                f"{DURATION_S}."
            )
        rows.append((fields[1], fields[0], int(fields[3]), int(fields[4])))
    classes = sorted({row[1] for row in rows})
    weak = np.array([classes.index(row[1]) for row in rows], dtype=np.int64)
    segments = np.full((len(rows), DURATION_S), len(classes), dtype=np.int64)
    for row, (_, _, start, end) in enumerate(rows):
        segments[row, start:end] = weak[row]
    return AVEAnnotations([row[0] for row in rows], classes, weak, segments)


def _is_interval(start: str, end: str) -> bool:
    return start.isdecimal() and end.isdecimal() and 0 <= int(start) <= int(end) <= DURATION_S
