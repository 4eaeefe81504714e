"""The streams of a clip's files: video and audio, or one of them if clips may lack a modality."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av.error

from distav.data.preparation.encoding import ANY_HINT, Encoding, RejectedClip
from distav.data.preparation.media.audio import AudioTrack
from distav.data.preparation.media.tracks import MissingStream, Track, UndecodableStream
from distav.data.preparation.media.video import VideoTrack

_READ_ERRORS = (av.error.FFmpegError, ValueError, OSError)


@dataclass(frozen=True)
class TrackPair:
    """The open streams of a clip's files.

    Attributes:
        video, audio: the streams; None where a clip has none.
        repairs: why a stream that exists is not used.
    """

    video: VideoTrack | None
    audio: AudioTrack | None
    repairs: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[VideoTrack | AudioTrack]:
        return (track for track in (self.video, self.audio) if track is not None)

    @property
    def names(self) -> str:
        """What the clips have, for messages."""
        return " and ".join(track.kind for track in self)

    @property
    def counters(self) -> tuple[int, int, int]:
        """Damaged packets of video and audio so far, and changes of the audio format."""
        video, audio = self.video, self.audio
        return video.damaged if video else 0, audio.damaged if audio else 0, audio.format_changes if audio else 0

    def close(self) -> None:
        """Close the files."""
        for track in self:
            track.close()


def open_tracks(path: Path, audio_path: Path | None, start_s: float, encoding: Encoding) -> TrackPair:
    """Open the video and the audio stream of a file, or of two files.

    With `Encoding.modalities` of `any`, a stream may be missing; one of which no frame can be decoded is left out.

    Args:
        path: the file of the video.
        audio_path: the file of the audio, which starts at the same time; None: `path`.
        start_s: where reading starts.
        encoding: sample rate and modalities.

    Raises:
        RejectedClip: if a stream is missing that the clips need.
        av.error.FFmpegError: if a file cannot be opened.
    """
    tracks: dict[str, Track] = {}
    faults: dict[str, RejectedClip] = {}
    openers: dict[str, Callable[[], Track]] = {
        "video": lambda: VideoTrack(path, start_s),
        "audio": lambda: AudioTrack(audio_path or path, start_s, encoding.sample_rate_hz),
    }
    single_allowed = encoding.modalities == "any"
    try:
        for kind, open_track in openers.items():
            try:
                tracks[kind] = open_track()
            except (MissingStream, UndecodableStream) as reason:
                faults[kind] = reason
            except _READ_ERRORS as error:
                if audio_path is None or not single_allowed:
                    raise
                reason = getattr(error, "strerror", None) or error
                faults[kind] = UndecodableStream(f"not decodable: the {kind} file cannot be opened ({reason})")
        if audio_path is None and len(tracks) == 2:
            tracks["audio"].timeline = tracks["video"].timeline
        if single_allowed:
            _drop_undecodable(tracks, faults)
        _check_complete(tracks, faults, single_allowed)
    except BaseException:
        for track in tracks.values():
            track.close()
        raise
    video, audio = tracks.get("video"), tracks.get("audio")
    assert video is None or isinstance(video, VideoTrack)
    assert audio is None or isinstance(audio, AudioTrack)
    repairs = [
        f"{kind}: left out, {str(reason).partition(': ')[2]}"
        for kind, reason in faults.items()
        if isinstance(reason, UndecodableStream)
    ]
    return TrackPair(video, audio, tuple(repairs))


def _drop_undecodable(tracks: dict[str, Track], faults: dict[str, RejectedClip]) -> None:
    """Move the streams of which no frame can be decoded from `tracks` to `faults`."""
    for kind, track in list(tracks.items()):
        try:
            track.check_decodable()
        except UndecodableStream as reason:
            faults[kind] = reason
            tracks.pop(kind).close()


def _check_complete(tracks: dict[str, Track], faults: dict[str, RejectedClip], single_allowed: bool) -> None:
    """Raise the reason to reject a file that lacks a stream, unless one stream suffices."""
    if not faults or (tracks and single_allowed):
        return
    if not tracks and all(isinstance(reason, MissingStream) for reason in faults.values()):
        raise RejectedClip("no video: the file has neither a video nor an audio stream")
    # A stream that cannot be decoded is a more precise reason than one that does not exist.
    undecodable = [reason for reason in faults.values() if isinstance(reason, UndecodableStream)]
    reason = undecodable[0] if undecodable and not tracks else next(iter(faults.values()))
    raise RejectedClip(f"{reason}; {ANY_HINT}" if tracks else str(reason))
