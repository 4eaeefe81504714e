"""Decoding of media files that are stored inside another file, such as a tar or a Parquet table."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av.error

from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.containers import open_container
from distav.data.preparation.media.decoding import decode_clips

VIDEO_EXTENSIONS = ("mp4", "webm", "avi", "mkv", "mov", "m4v", "mpg", "mpeg", "flv", "wmv", "ogv", "3gp")
"""Extensions of members that are videos."""
AUDIO_EXTENSIONS = ("wav", "flac", "mp3", "m4a", "ogg", "opus", "aac")
"""Extensions of members that are the audio of a video without audio, or of a clip without video."""


@dataclass(frozen=True)
class EmbeddedFile:
    """A media file inside another file.

    Attributes:
        extension: its extension without the dot.
        copy_to: writes its content to a file; raises RejectedClip if it cannot be read.
    """

    extension: str
    copy_to: Callable[[BinaryIO], None]


def decode_embedded(
    video: EmbeddedFile | Path | None, audio: EmbeddedFile | Path | None, candidate: ClipSource, encoding: Encoding
) -> Iterator[Clip]:
    """Copy embedded media to temporary files and cut them into clips.

    Args:
        video: the video, embedded or a file of its own; None: `audio` is the only file.
        audio: the audio of the video, used if the video has none; if clips may lack a modality, also if the video
            cannot be opened.
        candidate: interval and name of the video.
        encoding: rates, size, duration and modalities of the clips.

    Raises:
        RejectedClip: as `decode_clips`.
    """
    with tempfile.TemporaryDirectory(prefix="distav-media-") as folder:
        if video is None:
            assert audio is not None
            yield from decode_clips(_copy(audio, Path(folder), "audio"), candidate, encoding)
            return
        video_path = _copy(video, Path(folder), "video")
        if audio is None or _has_audio(video_path, if_unreadable=encoding.modalities == "both"):
            yield from decode_clips(video_path, candidate, encoding)
        else:
            yield from decode_clips(video_path, candidate, encoding, _copy(audio, Path(folder), "audio"))


def _copy(member: EmbeddedFile | Path, folder: Path, name: str) -> Path:
    """Return the path of a copy of an embedded file, or that of a file of its own."""
    if isinstance(member, Path):
        return member
    path = folder / f"{name}.{member.extension}"
    with open(path, "xb") as file:
        member.copy_to(file)
    return path


def _has_audio(path: Path, if_unreadable: bool) -> bool:
    """Return whether a file has an audio stream; `if_unreadable` for files that cannot be opened."""
    try:
        with open_container(path) as container:
            return bool(container.streams.audio)
    except (RejectedClip, av.error.FFmpegError, ValueError):
        return if_unreadable
