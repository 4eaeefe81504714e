"""Video of a media file as upright frames with square pixels, read by time."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation

from distav.data.preparation.encoding import Encoding, RejectedClip
from distav.data.preparation.media.tracks import Track

MAX_SIDE = 16384
"""Largest stored width and height in pixels, that of H.264; JPEG and VP9 allow 65500."""

Matrix = tuple[int, int, int, int]


class VideoTrack(Track):
    """The video stream of a file, read forward.

    Attributes:
        end_s: end of the stream; None until it is known.
        next_s: time of the next frame; None at the end of the stream.
        first_s: time of the first frame; None if it has not been read.
    """

    def __init__(self, path: Path, start_s: float):
        super().__init__(path, "video", start_s)
        self.end_s: float | None = None
        self.next_s: float | None = None
        self.first_s: float | None = None
        self._current: VideoFrame | None = None
        self._current_s = 0.0
        self._next: VideoFrame | None = None
        self._started = False

    def frame_at(self, time_s: float) -> tuple[VideoFrame, float]:
        """Return the frame that is displayed at a time, and the distance to its start in seconds.

        Before the first frame that is the first one, and after the last frame the last one. Times may not decrease.

        Raises:
            RejectedClip: if no frame can be decoded.
        """
        if not self._started:
            self._started = True
            self._advance()
            self.first_s = self.next_s
            self._advance()
        while self.next_s is not None and self.next_s <= time_s + 1e-6:
            self._advance()
        if self._current is None:
            raise RejectedClip("truncated: no frame could be decoded")
        return self._current, abs(time_s - self._current_s)

    def _advance(self) -> None:
        if self._next is not None and self.next_s is not None:
            self._current, self._current_s = self._next, self.next_s
        self.next_s, self._next = next(self._frames, (None, None))
        if self._next is None and self._current is not None:
            self.end_s = max(self._current_s + self.step_s, self.repeated_until_s, self._declared_end_s(self._current))

    def _declared_end_s(self, frame: VideoFrame) -> float:
        """Return the end of the last frame according to its duration, but not after that of the file."""
        # A frame that a decoder has held back may have no time base.
        duration_s = float((frame.duration or 0) * (frame.time_base or self.stream.time_base or 0))
        return min(self._current_s + duration_s, self.declared_s)

    def display_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return width and height of a frame with square pixels, before it is turned upright."""
        stream: Any = self.stream
        ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
        if ratio <= 0 or ratio == 1:
            return frame.width, frame.height
        if ratio > 1:
            return round(frame.width * ratio), frame.height
        return frame.width, round(frame.height / ratio)

    def images(self, frames: list[VideoFrame], encoding: Encoding) -> np.ndarray:
        """Return frames [T, H, W, 3] uint8 in the stored size of the first one, upright.

        Frames of another shape are scaled to fit between black borders.
        """
        matrix = _display_matrix(frames[0])
        first = self._image(frames[0], encoding, matrix)
        images, last = [first], first
        for previous, frame in zip(frames, frames[1:], strict=False):
            if frame is not previous:
                last = _fit(self._image(frame, encoding, matrix), first.shape)
            images.append(last)
        return np.stack(images)

    def _image(self, frame: VideoFrame, encoding: Encoding, matrix: Matrix) -> np.ndarray:
        width, height = encoding.size_of(*self.display_size(frame))
        if max(width, height) > MAX_SIDE:
            raise RejectedClip(
                f"not supported: frames of {frame.width} x {frame.height} pixels have {width} x {height} at the stored "
                f"size; allowed: {MAX_SIDE}"
            )
        image = frame.reformat(width, height, format="rgb24", interpolation=Interpolation.AREA).to_ndarray()
        return _upright(image, matrix)


def _display_matrix(frame: VideoFrame) -> Matrix:
    """Return a, b, c, d: a pixel at column x and row y is displayed at column ax + cy and row bx + dy."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    return a, b, c, d


def _upright(image: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Apply a display matrix, rounded to quarter turns and reflections, to an image [H, W, 3]."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _fit(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image [H, W, 3] scaled to fit into a shape, centered between black borders."""
    if image.shape == shape:
        return image
    height, width = shape[:2]
    scale = min(height / image.shape[0], width / image.shape[1])
    size = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    scaled = frame.reformat(size[1], size[0], interpolation=Interpolation.AREA).to_ndarray()
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas = np.zeros(shape, np.uint8)
    canvas[top : top + size[0], left : left + size[1]] = scaled
    return canvas
