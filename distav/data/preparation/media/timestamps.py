"""Times of the frames of a stream, from its time stamps."""

from dataclasses import dataclass, field
from fractions import Fraction

from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

BACKWARD_S = 0.5
"""Time by which a frame has to precede its predecessor for the clock to have been set back."""
_SAME_JUMP_S = 5.0
"""Largest difference of the distances by which the clocks of two streams are set back in one place."""

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


class Clock:
    """Times of the frames of a stream.

    Args:
        timeline: of the file.
        step_s: usual duration of a frame.
        time_base: of the time stamps.
        decoding_delay: if given, frames are placed by their time stamps of decoding, less this delay.

    Attributes:
        expected_s: end of the previous frame; None before the first one.
    """

    def __init__(self, timeline: Timeline, step_s: float, time_base: Fraction, decoding_delay: int | None):
        self.timeline, self.step_s, self.time_base = timeline, step_s, time_base
        self.decoding_delay = decoding_delay
        self.expected_s: float | None = None
        self._place, self._offset_s = 0, 0.0

    def time(self, frame: Frame) -> float:
        """Return the time of a frame, which continues its predecessor if it has no time stamp."""
        expected_s, stamp = self.expected_s, self._stamp(frame)
        if stamp is None:
            return expected_s or 0.0
        # A frame that a decoder has held back may have no time base.
        stamp_s = float(stamp * (frame.time_base or self.time_base)) - self.timeline.origin_s
        time_s = stamp_s + self._offset_s
        if expected_s is not None and time_s < expected_s - self._duration(frame) - BACKWARD_S:
            self._offset_s = self.timeline.offset(self._place, expected_s - stamp_s)
            self._place += 1
            time_s = stamp_s + self._offset_s
        return time_s

    def _stamp(self, frame: Frame) -> int | None:
        if self.decoding_delay is not None:
            return None if frame.dts is None else frame.dts - self.decoding_delay
        return frame.dts if frame.pts is None and self.expected_s is None else frame.pts

    def advance(self, time_s: float, frame: Frame) -> None:
        """Set the end of the previous frame."""
        self.expected_s = time_s + self._duration(frame)

    def _duration(self, frame: Frame) -> float:
        return frame.samples / frame.sample_rate if isinstance(frame, AudioFrame) else self.step_s
