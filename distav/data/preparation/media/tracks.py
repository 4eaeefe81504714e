"""Reading of one stream of a media file: packets, damaged ones included, and the times of its frames.

All times are seconds since the start of the file, which containers may place anywhere. Video and audio are read from
two open files, so that memory does not depend on how far apart a file stores what belongs together.
"""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Discard
from av.video.stream import VideoStream

from distav.data.preparation.encoding import RejectedClip
from distav.data.preparation.media.containers import (
    choose_stream,
    decoding_delay,
    has_unknown_size,
    needs_decoding_delay,
    open_container,
    seek,
)
from distav.data.preparation.media.formats import check_format, declares_duration, missing_factor
from distav.data.preparation.media.timestamps import BACKWARD_S, Clock, Frame, Timeline

_HOLE_S, _HOLE_FRAMES = 1.0, 2
"""Distance of frames from which on a stream has a hole, in seconds and in usual durations of a frame."""
_MAX_FAILED_READS = 100
_MIN_PACKETS = 20
"""Packets before a stream can be rejected as mostly damaged."""


class MissingStream(RejectedClip):
    """A file has no stream of a kind."""


class UndecodableStream(RejectedClip):
    """No frame of a stream can be decoded."""


class Track:
    """One stream of a file.

    Args:
        path: the file.
        kind: `video` or `audio`.
        start_s: where reading starts; a little earlier if the container can seek only to key frames.

    Raises:
        MissingStream: if the file has no such stream.
        UndecodableStream: if FFmpeg has no decoder for it.
        RejectedClip: if the file is an image or text.
        av.error.FFmpegError: if the file cannot be opened.

    Attributes:
        timeline: shared by the tracks of a file; assign that of the other track.
        step_s: usual duration of a frame.
        hole_s: duration of a frame from which on the stream has a hole.
        declared_s: duration that the file declares for the stream or, if it does not, for all; 0 if unknown.
        damaged: number of packets that could not be decoded.
        repeated_until_s: end of the last packet that repeats the previous frame.
    """

    def __init__(self, path: Path, kind: str, start_s: float):
        self.path, self.kind, self.start_s = path, kind, start_s
        self.container: InputContainer = open_container(path)
        check_format(self.container)
        self.stream = self._select_stream()
        for stream in self.container.streams:
            if stream.index != self.stream.index:
                stream.discard = Discard.all
        self.timeline = Timeline((self.container.start_time or 0) / av.time_base)
        rate = getattr(self.stream, "average_rate", None) or getattr(self.stream, "guessed_rate", None)
        self.step_s = 1 / float(rate) if rate else 0.04
        self.hole_s = max(_HOLE_S, _HOLE_FRAMES * self.step_s)
        self.declared_s = self._declared_duration()
        self.damaged = self._packets = 0
        self.repeated_until_s = 0.0
        self._sought = start_s > 1
        self._key_frame_read = False
        self._decoding_delay = decoding_delay(path) if needs_decoding_delay(self.container, self.stream) else None
        if self._sought and not seek(self.container, self.stream, start_s - 1 + self.timeline.origin_s):
            self._reopen()
        self._frames: Iterator[tuple[float, Any]] = self.frames()

    def check_decodable(self) -> None:
        """Decode the first frame, which is still read by the methods of the track.

        Raises:
            UndecodableStream: if no frame can be decoded.
        """
        try:
            first = next(self._frames, None)
        except RejectedClip as reason:
            raise UndecodableStream(str(reason)) from None
        if first is None:
            raise UndecodableStream(f"not decodable: no frame of the {self.kind} stream could be decoded")
        self._frames = itertools.chain((first,), self._frames)

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def frames(self) -> Iterator[tuple[float, Frame]]:
        """Yield the decoded frames with their times, which do not decrease by more than half a second.

        A single frame whose time lies far ahead of its neighbors is left out.
        """
        suspect: tuple[float, Frame] | None = None
        time_base = self.stream.time_base or Fraction(1, av.time_base)
        clock = Clock(self.timeline, self.step_s, time_base, self._decoding_delay)
        first = True
        for frame in self._decoded():
            time_s = clock.time(frame)
            if first and self._sought and time_s > self.start_s:
                self._reopen()
                yield from self.frames()
                return
            first = False
            if suspect is not None:
                if time_s >= suspect[0] - BACKWARD_S:
                    clock.advance(*suspect)
                    yield suspect
                suspect = None
            if clock.expected_s is not None and time_s > clock.expected_s + self.hole_s:
                suspect = time_s, frame
                continue
            clock.advance(time_s, frame)
            yield time_s, frame
        if suspect is not None:
            yield suspect
        if first and self._sought:
            self._reopen()
            yield from self.frames()

    def _reopen(self) -> None:
        """Read from the beginning of the file, because the container cannot seek to a time before the requested one."""
        self.container.close()
        self.container = open_container(self.path)
        self.stream = self._select_stream()
        self._sought = self._key_frame_read = False

    def _select_stream(self) -> VideoStream | AudioStream:
        stream = choose_stream(self.container, self.kind)
        if stream is None:
            self.container.close()
            raise MissingStream(f"no {self.kind}: the file has no {self.kind} stream")
        if stream.codec_context is None:
            self.container.close()
            raise UndecodableStream(f"not decodable: FFmpeg has no decoder for the {self.kind} stream")
        stream.codec_context.thread_count = 1
        return stream

    def _declared_duration(self) -> float:
        if has_unknown_size(self.path) or not declares_duration(self.container, self.path):
            return 0.0
        stream, container_s = self.stream, (self.container.duration or 0) / av.time_base
        declared = [container_s] if container_s > 0 else []
        if stream.duration and stream.time_base:
            declared.append(float(stream.duration * stream.time_base))
        if tag := _seconds(stream.metadata.get("DURATION", "")):
            declared.append(tag)
        if self.kind == "video" and stream.frames > 1:
            declared.append(stream.frames * self.step_s)
        return min(declared, default=0.0) * missing_factor(self.container, self.path)

    def _decoded(self) -> Iterator[Frame]:
        """Yield the frames of all packets that can be decoded.

        Raises:
            RejectedClip: if most packets cannot be decoded.
        """
        for packet in self._read_packets():
            if not packet.size:  # It repeats the previous frame; at the end of the file it has no time.
                if packet.pts is not None:
                    pts_s = float(packet.pts * packet.time_base) - self.timeline.origin_s
                    self.repeated_until_s = pts_s + self.step_s
                continue
            self._key_frame_read |= packet.is_keyframe
            self._packets += self._key_frame_read
            yield from self._decode(packet)
        yield from self._decode(None)

    def _decode(self, packet: av.Packet | None) -> list[Any]:
        """Return the frames of a packet; at the end, with None, those that the decoder has held back.

        Packets before the first key frame, and the first one after a seek, are incomplete, but not damaged.
        """
        try:
            return self.stream.codec_context.decode(packet)  # pyright: ignore[reportArgumentType, reportReturnType]
        except EOFError:
            return []
        except (av.error.FFmpegError, ValueError):
            if not self._key_frame_read or (self._sought and self._packets == 1):
                return []
            self.damaged += 1
            if self.damaged > _MIN_PACKETS and self.damaged > self._packets / 2:
                raise RejectedClip(
                    f"damaged: {self.damaged} of {self._packets} packets of the {self.kind} stream cannot be decoded"
                ) from None
            return []

    def _read_packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the stream; reading continues after an unreadable part of the file."""
        for _ in range(_MAX_FAILED_READS):
            try:
                yield from self.container.demux(self.stream)
                return
            except av.error.FFmpegError:
                self.damaged += 1


def _seconds(text: str) -> float:
    """Return the seconds of `HH:MM:SS.fraction`; 0 for any other text."""
    try:
        hours, minutes, seconds = map(float, text.split(":"))
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds
