"""Datasets of annotated videos with published event labels, stored as clips or as features."""

import argparse
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.annotations.multi_labels import LABEL_SEPARATOR
from distav.data.modalities import MODALITIES, STREAM_NAME, FeatureStream
from distav.data.pipeline.features import decode_features, read_header
from distav.data.pipeline.reader import DecodeError
from distav.data.preparation.encoding import MODALITY_CHOICES, Clip, ClipSource, Encoding, Features, RejectedClip
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.source import SourceInfo

YOUTUBE_ID_LENGTH = 11
"""Characters of a YouTube id; published feature files are named after it."""
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts", ".wmv")
_HEADER_BYTES = 512


@dataclass(frozen=True)
class VideoAnnotation:
    """The annotation of one video.

    Attributes:
        name: name of the video.
        split: name of its split.
        classes: indices of the classes that occur in it.
        events: [2, T, C] bool, audio and visual events by second; None where they are not annotated.
    """

    name: str
    split: str
    classes: tuple[int, ...]
    events: np.ndarray | None


@dataclass(frozen=True)
class FeatureFolder:
    """A directory with one .npy file of features [steps, dim] per video.

    Attributes:
        modality: `audio` or `visual`.
        name: name of the feature stream.
        folder: the directory.
    """

    modality: str
    name: str
    folder: Path

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `MODALITY:NAME=DIR`.

        Raises:
            UserError: for any other text.
        """
        stream, _, folder = text.partition("=")
        modality, _, name = stream.partition(":")
        if modality not in MODALITIES or not STREAM_NAME.fullmatch(name) or not folder:
            raise UserError(
                f"--features {text}: has to be MODALITY:NAME=DIR; MODALITY is one of {format_list(MODALITIES)}, and "
                "NAME consists of lower-case letters, digits and _."
            )
        return cls(modality, name, Path(folder))

    def stream(self) -> FeatureStream:
        """Return the shape of the features, read from the first file.

        Raises:
            UserError: if there is no .npy file, or if the first one does not hold [steps, dim].
        """
        file = min(self.folder.glob("*.npy"), default=None)
        if file is None:
            raise UserError(f"--features {self.modality}:{self.name}={self.folder}: contains no .npy files.")
        try:
            with open(file, "rb") as content:
                shape, _, _ = read_header(content.read(_HEADER_BYTES))
            steps, dim = shape
        except (DecodeError, ValueError) as error:
            raise UserError(
                f"--features {self.modality}:{self.name}: {file} is not an array [steps, dim] ({error})."
            ) from None
        return FeatureStream(self.modality, steps, dim)


@dataclass(frozen=True)
class AnnotatedVideos(ABC):
    """A directory of videos, or directories of features, with published annotations.

    A dataset is a subclass with `name`, `clip_seconds`, `multi_label`, a description and an example for the command
    line, `read_classes` and `read_annotations`.

    Attributes:
        annotations: directory of the published annotations.
        videos: directory of the videos, named by the complete name or by the YouTube id; None if features are given.
        features: directories of features, at least one per modality.
    """

    name: ClassVar[str]
    clip_seconds: ClassVar[float]
    multi_label: ClassVar[bool]

    annotations: Path
    videos: Path | None = None
    features: tuple[FeatureFolder, ...] = ()

    def __post_init__(self) -> None:
        if (self.videos is None) == (not self.features):
            raise UserError(f"{self.name}: give either --videos DIR, or --features MODALITY:NAME=DIR for each stream.")
        names = [stream.name for stream in self.features]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise UserError(f"{self.name}: --features: two streams are named '{repeated[0]}'; use different names.")
        missing = set(MODALITIES) - {stream.modality for stream in self.features}
        if self.features and missing:
            raise UserError(
                f"{self.name}: --features: no stream of the modality '{min(missing)}'; give one for each modality."
            )
        for folder in [self.videos] if self.videos else [stream.folder for stream in self.features]:
            if not folder.is_dir():
                raise UserError(f"{self.name}: {folder}: no such directory.")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes need the fields only, not the cached annotations.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the directory of annotations, `--videos` and `--features`."""
        parser.add_argument("annotations", type=Path, metavar="DIR", help="directory of the published annotations")
        parser.add_argument(
            "--videos", type=Path, metavar="DIR", help="directory of the videos, named NAME.* or YOUTUBE_ID.*"
        )
        parser.add_argument(
            "--features",
            action="append",
            default=[],
            metavar="MODALITY:NAME=DIR",
            help="store features instead of videos: directory of .npy files [steps, dim]; repeat for each stream",
        )

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        return cls(options.annotations, options.videos, tuple(map(FeatureFolder.parse, options.features)))

    @abstractmethod
    def read_classes(self) -> list[str]:
        """Return the published class names, in the order of their indices."""

    @abstractmethod
    def read_annotations(self) -> list[VideoAnnotation]:
        """Return the annotations of the videos of all splits."""

    def candidates(self) -> list[ClipSource]:
        """Return all annotated videos.

        Raises:
            UserError: if annotations are missing or malformed, or if a directory has no readable features.
        """
        return [ClipSource(video.name, self._label(video), video.split) for video in self._videos]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip | Features]:
        """Decode the first clip of the video, or read its features."""
        if self.videos:
            yield next(decode_clips(_find_file(self.videos, candidate, VIDEO_SUFFIXES), candidate, encoding))
            return
        values = {}
        for feature_folder in self.features:
            name = feature_folder.name
            try:
                content = _find_file(feature_folder.folder, candidate, (".npy",)).read_bytes()
                values[name] = decode_features(content, self._streams[name])
            except (DecodeError, OSError) as error:
                raise RejectedClip(f"not readable: {name}: {error}") from None
        yield Features(values)

    @property
    def allowed_modalities(self) -> tuple[str, ...]:
        """Allowed values of `--modalities`: samples of features always have all streams."""
        return ("both",) if self.features else MODALITY_CHOICES

    def info(self) -> SourceInfo:
        """Return classes, events and streams."""
        events = {
            (video.split, video.name, self._label(video)): video.events
            for video in self._videos
            if video.events is not None
        }
        return SourceInfo(self._classes, self.multi_label, events, self._streams)

    @cached_property
    def _classes(self) -> list[str]:
        return self.read_classes()

    @cached_property
    def _videos(self) -> list[VideoAnnotation]:
        return self.read_annotations()

    @cached_property
    def _streams(self) -> dict[str, FeatureStream]:
        return {feature_folder.name: feature_folder.stream() for feature_folder in self.features}

    def _label(self, video: VideoAnnotation) -> str:
        return LABEL_SEPARATOR.join(self._classes[index] for index in video.classes)


def _find_file(folder: Path, candidate: ClipSource, suffixes: tuple[str, ...]) -> Path:
    """Return the file of a video, which has its complete name or its YouTube id.

    Raises:
        RejectedClip: if there is none.
    """
    names = _names_by_stem(folder, suffixes)
    youtube_id = candidate.source[:YOUTUBE_ID_LENGTH]
    name = names.get(candidate.source) or names.get(youtube_id)
    if name is None:
        raise RejectedClip(f"missing: no file {youtube_id}.* in {folder}")
    return folder / name


@lru_cache(maxsize=8)
def _names_by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return the names of the files with one of these suffixes, by their stem."""
    names = [name for name in sorted(os.listdir(folder), reverse=True) if name.lower().endswith(suffixes)]
    return {Path(name).stem: name for name in names}
