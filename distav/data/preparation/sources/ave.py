"""The AVE dataset (Audio-Visual Event localization; Tian et al. 2018)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.annotations.ave import DURATION_S, AVEAnnotations, read_ave
from distav.data.annotations.tables import read_utf8
from distav.data.modalities import MODALITIES
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.annotated_videos import AnnotatedVideos, VideoAnnotation

SPLITS = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}
"""Published lists of the videos of each split."""


@dataclass(frozen=True)
class AVESource(AnnotatedVideos):
    """`ave`: the videos or features of AVE; one event per video that is both audible and visible."""

    name: ClassVar[str] = "ave"
    clip_seconds: ClassVar[float] = float(DURATION_S)
    multi_label: ClassVar[bool] = False
    description: ClassVar[str] = "AVE: videos with one event each that is both audible and visible."
    example: ClassVar[str] = "make_shards.py ave AVE_Dataset shards/ave --videos AVE_Dataset/AVE --codec h264"
    default_encoding: ClassVar[Encoding] = Encoding(clip_s=float(DURATION_S))

    def read_classes(self) -> list[str]:
        """Return the classes that occur in Annotations.txt, sorted.

        Raises:
            UserError: for a missing or malformed file.
        """
        return self._published.classes

    def read_annotations(self) -> list[VideoAnnotation]:
        """Return the annotations of the videos of all splits.

        Raises:
            UserError: for a missing or malformed file, or for a video that is not in Annotations.txt.
        """
        published = self._published
        background = len(published.classes)
        rows = {
            (name, int(label)): row
            for row, (name, label) in enumerate(zip(published.names, published.weak, strict=True))
        }
        videos = []
        for split, file in SPLITS.items():
            for class_name, name in _read_split(self.annotations / file):
                label = published.classes.index(class_name) if class_name in published.classes else -1
                row = rows.get((name, label))
                if row is None:
                    raise UserError(
                        f"{self.annotations / file}: '{name}' with class '{class_name}' is not in Annotations.txt."
                    )
                seconds = published.segments[row] < background
                events = np.zeros((len(MODALITIES), len(seconds), background), dtype=bool)
                events[:, seconds, label] = True
                videos.append(VideoAnnotation(name, split, (label,), events))
        return videos

    @cached_property
    def _published(self) -> AVEAnnotations:
        return read_ave(self.annotations / "Annotations.txt")


def _read_split(path: Path) -> Iterator[tuple[str, str]]:
    """Yield class and video name of each line of a split's list, which has the form of Annotations.txt."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; AVE has the files {format_list(SPLITS.values())}.")
    for number, line in enumerate(read_utf8(path, str(path)).splitlines(), start=1):
        parts = line.split("&")
        if len(parts) != 5:
            raise UserError(f"{path}, line {number}: '{line[:80]}' does not have the form of Annotations.txt.")
        yield parts[0], parts[1]
