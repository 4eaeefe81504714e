"""LLP and AVE: ten-second videos of which people told what is heard and seen, as clips or as features of them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from distav.config.errors import UserError, format_list
from distav.data.annotations.ave import read_ave
from distav.data.annotations.llp import CLASSES, VIDEOS, read_llp
from distav.data.modalities import MODALITIES, STREAM_NAME, FeatureStream
from distav.data.pipeline.features import decode_features, read_header
from distav.data.pipeline.reader import DecodeError
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, Features, RejectedClip
from distav.data.preparation.media_decoding import decode_clips

ID_LENGTH = 11
"""Characters of a YouTube id, by which LLP's feature files are named."""
VIDEOS_OF = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".m4v", ".mpg", ".mpeg", ".3gp", ".ts", ".wmv")
_HEADER_BYTES = 512
AVE_SPLITS = {"train": "trainSet.txt", "val": "valSet.txt", "test": "testSet.txt"}


@dataclass(frozen=True)
class Annotation:
    """What was told of one video.

    Attributes:
        name: of the video.
        split: that it belongs to.
        classes: numbers of what occurs in it.
        events: [2, T, C] bool, heard and seen; None where nobody told.
    """

    name: str
    split: str
    classes: tuple[int, ...]
    events: np.ndarray | None


@dataclass(frozen=True)
class SourceInfo:
    """What a source tells of its samples besides one class each; by default nothing.

    Attributes:
        classes: in the order of their numbers; None for those that occur, sorted.
        several: whether a sample may have several.
        events: [2, T, C] bool by split, source and label.
        streams: features in place of clips.
    """

    classes: list[str] | None = None
    multi_label: bool = False
    events: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict[tuple[str, str, str], np.ndarray])
    streams: dict[str, FeatureStream] = field(default_factory=dict[str, FeatureStream])


@dataclass(frozen=True)
class EventSource:
    """`llp` and `ave`: a folder of videos, or of features, and the published annotations."""

    benchmark: str
    annotations: Path
    videos: Path | None = None
    features: tuple[tuple[str, str, Path], ...] = ()
    """Sense, name and folder of each stream."""

    def __post_init__(self) -> None:
        if (self.videos is None) == (not self.features):
            raise UserError(
                f"{self.benchmark}: give either --videos DIR, or --features MODALITY:NAME=DIR for each stream."
            )
        names = [name for _, name, _ in self.features]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(
                f"{self.benchmark}: --features names '{twice[0]}' twice; give each stream a name of its own."
            )
        missing = set(MODALITIES) - {modality for modality, _, _ in self.features}
        if self.features and missing:
            raise UserError(f"{self.benchmark}: --features has none of the modality '{min(missing)}'.")
        for folder in [self.videos] if self.videos else [folder for _, _, folder in self.features]:
            if not folder.is_dir():
                raise UserError(f"{self.benchmark}: {folder}: no such folder.")

    def __getstate__(self) -> dict[str, Any]:
        # What was read of the annotations does not travel to the workers.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def candidates(self) -> list[ClipSource]:
        """Return every annotated video.

        Raises:
            UserError: for annotations that are missing or broken, or features of which no file can be read.
        """
        return [ClipSource(each.name, self._label(each), each.split) for each in self._annotated]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip | Features]:
        """Decode the first clip of the video, or read its features."""
        if not self.videos:
            values = {}
            for name, stream in self.streams.items():
                try:
                    values[name] = decode_features(
                        _found(self._folder(name), candidate, (".npy",)).read_bytes(), stream
                    )
                except (DecodeError, OSError) as error:
                    raise RejectedClip(f"{name}: {error}") from None
            yield Features(values)
        else:
            yield next(decode_clips(_found(self.videos, candidate, VIDEOS_OF), candidate, encoding))

    def info(self) -> SourceInfo:
        """Return classes, events and streams."""
        events = {(each.split, each.name, self._label(each)): each.events for each in self._annotated}
        known = {key: value for key, value in events.items() if value is not None}
        return SourceInfo(self.classes, self.benchmark == "llp", known, self.streams)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, as published."""
        return list(CLASSES) if self.benchmark == "llp" else read_ave(self.annotations / "Annotations.txt").classes

    @cached_property
    def streams(self) -> dict[str, FeatureStream]:
        """The shape of each stream, by the first of its files."""
        found = {}
        for modality, name, folder in self.features:
            file = min(folder.glob("*.npy"), default=None)
            if file is None:
                raise UserError(f"--features {modality}:{name}={folder}: holds no .npy files.")
            try:
                with open(file, "rb") as content:
                    shape, _, _ = read_header(content.read(_HEADER_BYTES))
                steps, dim = shape
            except (DecodeError, ValueError) as error:
                raise UserError(f"--features {modality}:{name}: {file} does not hold [steps, dim] ({error}).") from None
            found[name] = FeatureStream(modality, steps, dim)
        return found

    def _folder(self, stream: str) -> Path:
        return next(folder for _, name, folder in self.features if name == stream)

    def _label(self, video: Annotation) -> str:
        return ",".join(self.classes[number] for number in video.classes)

    @cached_property
    def _annotated(self) -> list[Annotation]:
        return _llp(self.annotations) if self.benchmark == "llp" else _ave(self.annotations)


def parse_features(text: str) -> tuple[str, str, Path]:
    """Read `MODALITY:NAME=DIR`.

    Raises:
        UserError: for anything else.
    """
    stream, _, folder = text.partition("=")
    modality, _, name = stream.partition(":")
    if modality not in MODALITIES or not STREAM_NAME.fullmatch(name) or not folder:
        raise UserError(
            f"--features {text}: write MODALITY:NAME=DIR, with a modality of {format_list(MODALITIES)} and a name of small letters, "
            "digits and _."
        )
    return modality, name, Path(folder)


def _found(folder: Path, candidate: ClipSource, suffixes: tuple[str, ...]) -> Path:
    """Return the file of a video, named in full or by its YouTube id."""
    files = _files(folder, suffixes)
    name = files.get(candidate.source) or files.get(candidate.source[:ID_LENGTH])
    if name is None:
        raise RejectedClip(f"missing: no file {candidate.source[:ID_LENGTH]}.* in {folder}")
    return folder / name


@lru_cache(maxsize=8)
def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Return the names of the files of these kinds in a folder by what stands before their extension."""
    names = [name for name in sorted(os.listdir(folder), reverse=True) if name.lower().endswith(suffixes)]
    return {Path(name).stem: name for name in names}


def _llp(folder: Path) -> list[Annotation]:
    found = []
    for split in VIDEOS:
        told = read_llp(folder, split)
        for number, name in enumerate(told.names):
            events = None if told.events is None else told.events[number]
            found.append(Annotation(name, split, tuple(np.flatnonzero(told.weak[number]).tolist()), events))
    return found


def _ave(folder: Path) -> list[Annotation]:
    told = read_ave(folder / "Annotations.txt")
    place = {(name, int(kind)): number for number, (name, kind) in enumerate(zip(told.names, told.weak, strict=True))}
    found = []
    for split, file in AVE_SPLITS.items():
        for kind, name in _ave_rows(folder / file):
            number = place.get((name, told.classes.index(kind) if kind in told.classes else -1))
            if number is None:
                raise UserError(f"{folder / file}: {kind} in {name} is not in Annotations.txt.")
            seconds = told.segments[number] < len(told.classes)
            events = np.zeros((len(MODALITIES), len(seconds), len(told.classes)), dtype=bool)
            events[:, seconds, told.weak[number]] = True
            found.append(Annotation(name, split, (int(told.weak[number]),), events))
    return found


def _ave_rows(path: Path) -> Iterator[tuple[str, str]]:
    """Yield class and video of each line of a list, in the form of Annotations.txt."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; AVE comes with {format_list(AVE_SPLITS.values())}.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split("&")
        if len(parts) != 5:
            raise UserError(f"{path}, line {number}: '{line[:80]}' is not of the form of Annotations.txt.")
        yield parts[0], parts[1]
