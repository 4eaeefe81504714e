"""The LLP dataset (Look, Listen and Parse; Tian et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from distav.data.annotations.llp import CLASSES, DURATION_S, VIDEOS, read_llp
from distav.data.preparation.encoding import Encoding
from distav.data.preparation.sources.annotated_videos import AnnotatedVideos, VideoAnnotation


@dataclass(frozen=True)
class LLPSource(AnnotatedVideos):
    """`llp`: the videos or features of LLP; several classes per video, with audio and visual events in val and test."""

    name: ClassVar[str] = "llp"
    clip_seconds: ClassVar[float] = float(DURATION_S)
    multi_label: ClassVar[bool] = True
    description: ClassVar[str] = "LLP: videos with several classes each and with audio and visual events."
    example: ClassVar[str] = (
        "make_shards.py llp AVVP/data shards/llp --features audio:vggish=feats/vggish "
        "--features visual:res152=feats/res152 --features visual:r2plus1d_18=feats/r2plus1d_18"
    )
    default_encoding: ClassVar[Encoding] = Encoding(clip_s=float(DURATION_S))

    def read_classes(self) -> list[str]:
        """Return the 25 classes of LLP."""
        return list(CLASSES)

    def read_annotations(self) -> list[VideoAnnotation]:
        """Return the annotations of the videos of all splits.

        Raises:
            UserError: for a missing or malformed file.
        """
        videos = []
        for split in VIDEOS:
            annotations = read_llp(self.annotations, split)
            for index, name in enumerate(annotations.names):
                events = None if annotations.events is None else annotations.events[index]
                classes = tuple(np.flatnonzero(annotations.weak[index]).tolist())
                videos.append(VideoAnnotation(name, split, classes, events))
        return videos
