"""Opening of media files, the choice of their streams, and seeking in them."""

import itertools
import os
from pathlib import Path
from typing import Any

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from distav.data.preparation.encoding import RejectedClip

_REFERRING_FORMATS = {
    "concat",
    "dash",
    "hls",
    "imf",
    "lavfi",
    "rtp",
    "rtsp",
    "sap",
    "sdp",
    "vobsub",
    "webm_dash_manifest",
}
"""FFmpeg's formats that read other files or URLs."""
_OPTIONS = {
    "format_whitelist": ",".join(sorted(av.formats_available - _REFERRING_FORMATS)),
    "protocol_whitelist": "file",
}
_TEXT_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Options for texts that are not UTF-8; since version 19, PyAV always replaces their characters."""
_PLAYLIST_HEADS = (b"#EXTM3U", b"ffconcat", b"[playlist]")
_LEAST_PLACEHOLDER = 0x7FFFF000
"""Smallest of the sizes, besides 0, that RIFF files have in their header if they were written to a pipe."""

_MAX_DELAY_PACKETS = 100
"""Packets after which the decoder should have returned a frame."""


def open_container(path: Path) -> InputContainer:
    """Open a media file, but no format that reads other files, such as a playlist.

    FFmpeg takes a relative path with a colon for a URL, so that it is opened by its absolute path.

    Raises:
        RejectedClip: if the file is a playlist.
        av.error.FFmpegError: if it cannot be opened.
    """
    with open(path, "rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(_PLAYLIST_HEADS):
        raise RejectedClip("not a video: the file is a playlist of other files")
    return av.open(os.path.abspath(path), container_options=_OPTIONS, **_TEXT_OPTIONS)


def choose_stream(container: InputContainer, kind: str) -> VideoStream | AudioStream | None:
    """Return the stream that players choose: the first default one, or else the first; None if there is none.

    Streams without a decoder are chosen last. Audio belongs to the same program as the video.

    Args:
        container: the file.
        kind: `video` or `audio`.
    """
    streams = [
        stream
        for stream in getattr(container.streams, kind)
        if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
    ]
    if kind == "audio" and (video := choose_stream(container, "video")) is not None:
        streams = _of_program(container, streams, video)
    streams.sort(key=lambda stream: (stream.codec_context is None, not stream.disposition & Disposition.default))
    return streams[0] if streams else None


def _of_program(
    container: InputContainer, streams: list[AudioStream], video: VideoStream | AudioStream
) -> list[AudioStream]:
    """Return the audio streams in the program of a video stream, all of them in files without programs.

    FFmpeg finds the best audio in the program of a stream; streams of one program have the same one.
    """
    best = container.streams.best("audio", related=video)
    return [stream for stream in streams if container.streams.best("audio", related=stream) is best]


def seek(container: InputContainer, stream: VideoStream | AudioStream, time_s: float) -> bool:
    """Seek to a time stamp in seconds.

    Returns:
        False if the file has to be read from its beginning: the format cannot seek, frames need a palette that only
        the first packet has, or FFmpeg takes the position in compressed WAV files for another one.
    """
    name = container.format.name
    if getattr(stream.codec_context, "pix_fmt", None) == "pal8" or (
        name in ("wav", "w64") and not stream.codec_context.name.startswith("pcm_")
    ):
        return False
    try:
        container.seek(int(time_s * av.time_base))
    except (av.error.FFmpegError, OSError):
        return False
    return True


def has_unknown_size(path: Path) -> bool:
    """Return whether a file is an AVI or WAV file without its size, so that its durations are not valid either."""
    with open(path, "rb") as file:
        head = file.read(8)
    return head[:4] == b"RIFF" and not 0 < int.from_bytes(head[4:], "little") < _LEAST_PLACEHOLDER


def needs_decoding_delay(container: InputContainer, stream: VideoStream | AudioStream) -> bool:
    """Return whether the frames of a stream have no valid time stamps of presentation: those with B-frames in AVI.

    AVI stores the order of decoding only, and FFmpeg's guesses of the times of presentation are out of order.
    """
    return container.format.name == "avi" and bool(getattr(stream.codec_context, "has_b_frames", False))


def decoding_delay(path: Path) -> int:
    """Return by how much the decoder delays the video of a file, in units of its time stamps.

    The n-th displayed frame has the time of the n-th decoded one, which is less than its own by this delay.

    Raises:
        av.error.FFmpegError: if the file cannot be opened.
    """
    with open_container(path) as container:
        stream = choose_stream(container, "video")
        assert isinstance(stream, VideoStream)
        first = None
        for packet in itertools.islice(container.demux(stream), _MAX_DELAY_PACKETS):
            try:
                frames = stream.codec_context.decode(packet)
            except (av.error.FFmpegError, ValueError):
                continue
            if packet.size and first is None:
                first = packet.dts
            if frames:
                return max(0, (frames[0].dts or 0) - (first or 0))
    return 0
