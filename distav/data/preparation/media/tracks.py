"""Reading of one stream of a media file: packets, damaged ones included, and the times of its frames.

All times are seconds since the start of the file, which containers may place anywhere. Video and audio are read from
two open files, so that memory does not depend on how far apart a file stores what belongs together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from distav.data.preparation.encoding import RejectedClip

_HOLE_S, _HOLE_FRAMES = 1.0, 2
"""Distance of frames from which on a stream has a hole, in seconds and in usual durations of a frame."""
_BACKWARD_S = 0.5
"""Time by which a frame has to precede its predecessor for the clock to have been set back."""
_SAME_JUMP_S = 5.0
"""Largest difference of the distances by which the clocks of two streams are set back in one place."""
_MAX_FAILED_READS = 100
_MIN_PACKETS = 20
"""Packets before a stream can be rejected as mostly damaged."""

Frame = VideoFrame | AudioFrame


@dataclass
class Timeline:
    """Where the clock of a file is set back, as in concatenated recordings, and by how much.

    Attributes:
        origin_s: time stamp of the start of the file.
        offsets: for each place, the seconds that the streams add from there on; the first stream to arrive decides.
    """

    origin_s: float
    offsets: list[float] = field(default_factory=list[float])

    def offset(self, place: int, needed_s: float) -> float:
        """Return the offset after a place, given the one with which a stream continues without a gap."""
        if place < len(self.offsets) and abs(self.offsets[place] - needed_s) < _SAME_JUMP_S:
            return self.offsets[place]
        if place == len(self.offsets):
            self.offsets.append(needed_s)
        return needed_s


class Track:
    """One stream of a file.

    Args:
        path: the file.
        kind: `video` or `audio`.
        start_s: where reading starts; a little earlier if the container can seek only to key frames.

    Raises:
        RejectedClip: if the file has no such stream.
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
        self.container: InputContainer = av.open(str(path), metadata_errors="replace")
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
        if self._sought:
            self.container.seek(int((start_s - 1 + self.timeline.origin_s) * av.time_base))

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def frames(self) -> Iterator[tuple[float, Frame]]:
        """Yield the decoded frames with their times, which do not decrease by more than half a second.

        A single frame whose time lies far ahead of its neighbors is left out.
        """
        suspect: tuple[float, Frame] | None = None
        clock = _Clock(self.timeline, self.step_s, self.stream.time_base or Fraction(1, av.time_base))
        first = True
        for frame in self._decoded():
            time_s = clock.time(frame)
            if first and self._sought and time_s > self.start_s:
                yield from self._from_the_beginning()
                return
            first = False
            if suspect is not None:
                if time_s >= suspect[0] - _BACKWARD_S:
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

    def _from_the_beginning(self) -> Iterator[tuple[float, Frame]]:
        """Read without seeking, because the container was positioned after the requested time."""
        self.container.close()
        self.container = av.open(str(self.path), metadata_errors="replace")
        self.stream = self._select_stream()
        self._sought = False
        yield from self.frames()

    def _select_stream(self) -> VideoStream | AudioStream:
        """Return the stream that players select: the first default one, or else the first."""
        streams: list[VideoStream | AudioStream] = [
            stream
            for stream in getattr(self.container.streams, self.kind)
            if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
        ]
        if not streams:
            self.container.close()
            raise RejectedClip(f"no {self.kind}: the file has no {self.kind} stream")
        stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
        if stream.codec_context is None:
            self.container.close()
            raise RejectedClip(f"not decodable: FFmpeg has no decoder for the {self.kind} stream")
        stream.codec_context.thread_count = 1
        return stream

    def _declared_duration(self) -> float:
        stream, container_s = self.stream, (self.container.duration or 0) / av.time_base
        declared = [container_s] if container_s > 0 else []
        if stream.duration and stream.time_base:
            declared.append(float(stream.duration * stream.time_base))
        if tag := _seconds(stream.metadata.get("DURATION", "")):
            declared.append(tag)
        if self.kind == "video" and stream.frames > 1:
            declared.append(stream.frames * self.step_s)
        return min(declared, default=0.0)

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
            self._packets += 1
            yield from self._decode(packet)
        yield from self._decode(None)

    def _decode(self, packet: av.Packet | None) -> list[Any]:
        """Return the frames of a packet; at the end, with None, those that the decoder has held back."""
        try:
            return self.stream.codec_context.decode(packet)  # pyright: ignore[reportArgumentType, reportReturnType]
        except EOFError:
            return []
        except (av.error.FFmpegError, ValueError):
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


class _Clock:
    """Times of the frames of a stream; `expected_s` is the end of the previous frame."""

    def __init__(self, timeline: Timeline, step_s: float, time_base: Fraction):
        self.timeline, self.step_s, self.time_base = timeline, step_s, time_base
        self.expected_s: float | None = None
        self._place, self._offset_s = 0, 0.0

    def time(self, frame: Frame) -> float:
        """Return the time of a frame, which continues its predecessor if it has no time stamp."""
        expected_s = self.expected_s
        if frame.pts is None:
            return expected_s or 0.0
        stamp_s = frame.time
        if stamp_s is None or math.isnan(stamp_s):  # A decoder has held the frame back, and it has no time base.
            stamp_s = float(frame.pts * self.time_base)
        stamp_s -= self.timeline.origin_s
        time_s = stamp_s + self._offset_s
        if expected_s is not None and time_s < expected_s - self._duration(frame) - _BACKWARD_S:
            self._offset_s = self.timeline.offset(self._place, expected_s - stamp_s)
            self._place += 1
            time_s = stamp_s + self._offset_s
        return time_s

    def advance(self, time_s: float, frame: Frame) -> None:
        """Set the end of the previous frame."""
        self.expected_s = time_s + self._duration(frame)

    def _duration(self, frame: Frame) -> float:
        return frame.samples / frame.sample_rate if isinstance(frame, AudioFrame) else self.step_s


def _seconds(text: str) -> float:
    """Return the seconds of `HH:MM:SS.fraction`; 0 for any other text."""
    try:
        hours, minutes, seconds = map(float, text.split(":"))
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds
