"""Audio of a media file as one mono signal at the sample rate of the dataset, placed by time stamps.

Legend: N samples, C channels.
"""

from collections import deque
from pathlib import Path

import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler

from distav.data.preparation.encoding import RejectedClip
from distav.data.preparation.media.tracks import Track

_GAP_S = 0.08
"""Distance between a time stamp and the end of the previous frame from which on samples are missing or repeated."""
_DRIFT_S = 0.008
"""Mean distance from which the time stamps determine the position again; below half a frame at 60 frames per second."""
_DRIFT_RATE = 0.1
"""Weight of a new frame in the mean distance; single time stamps may be rounded or wrong."""
_ANTIPHASE = 0.01
"""Energy of the mix relative to that of the first channel below which the channels cancel out."""
_FRONT, _CENTER, _SURROUND = np.sqrt(0.5), 1.0, 0.5
_WEIGHTS = {
    **dict.fromkeys(("FL", "FR", "FLC", "FRC", "DL", "DR", "WL", "WR"), _FRONT),
    **dict.fromkeys(("FC", "MONO"), _CENTER),
    **dict.fromkeys(("BL", "BR", "BC", "SL", "SR", "SDL", "SDR"), _SURROUND),
    **dict.fromkeys(("LFE", "LFE2"), 0.0),
}
"""Relative weights of channels in a mono mix, those of FFmpeg (ITU-R BS.775 with surround at -3 dB)."""
_OTHER_WEIGHT = 0.5


def mix_weights(channels: list[str]) -> np.ndarray:
    """Return the weights [C] of channels in a mono mix, which sum to 1, so that no mix exceeds full scale.

    Args:
        channels: FFmpeg's names of the channels, such as FL, FR and LFE.
    """
    weights = np.array([_WEIGHTS.get(name, _OTHER_WEIGHT) for name in channels], np.float32)
    total = weights.sum()
    return weights / total if total > 0 else np.full(len(channels), 1 / len(channels), np.float32)


class AudioTrack(Track):
    """The audio stream of a file, read forward in pieces.

    Args:
        path: the file.
        start_s: where reading starts.
        rate_hz: sample rate of the output.

    Attributes:
        end_s: end of the samples placed so far; at the end of the stream, its end.
        finished: whether the stream has ended.
        format_changes: how often sample rate or channels have changed.
    """

    def __init__(self, path: Path, start_s: float, rate_hz: int):
        super().__init__(path, "audio", start_s)
        self.rate_hz = rate_hz
        self.end_s = 0.0
        self.finished = False
        self.format_changes = 0
        self._pieces: deque[tuple[int, np.ndarray]] = deque()
        """First sample and samples [2, N], the mix and the first channel, in order and without overlap."""
        self._resampler: AudioResampler | None = None
        self._format: tuple[int, str, int, str] | None = None
        self._expected_s = self._drift_s = 0.0
        self._next_sample = 0

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return samples `first` to `first + count`, counted from the start of the file.

        Earlier samples can no longer be read.

        Returns:
            [N] float32 in [-1, 1], zeros where there are no samples, and [N] bool, where there are some.

        Raises:
            RejectedClip: if the stream has no samples.
        """
        while not self.finished and self._next_sample < first + count:
            self._advance()
        if self.finished and not self.end_s:
            raise RejectedClip("no audio: no audio could be decoded")
        signals, present = np.zeros((2, count), np.float32), np.zeros(count, bool)
        for start, piece in self._pieces:
            target = slice(max(0, start - first), max(0, min(count, start + piece.shape[1] - first)))
            source = slice(max(0, first - start), max(0, first - start) + target.stop - target.start)
            if target.stop > target.start:
                part = piece[:, source]
                valid = np.isfinite(part).all(axis=0)  # Files with samples as floats may contain NaN and infinity.
                signals[:, target], present[target] = np.where(valid, part, 0), valid
        while self._pieces and self._pieces[0][0] + self._pieces[0][1].shape[1] <= first:
            self._pieces.popleft()
        mix, channel = signals
        if np.dot(mix, mix) < _ANTIPHASE * np.dot(channel, channel):
            mix = channel
        return mix / max(1.0, float(np.abs(mix).max(initial=0.0))), present

    def next_start_s(self) -> float | None:
        """Return the time of the first sample that has not been dropped; None if there is none."""
        return self._pieces[0][0] / self.rate_hz if self._pieces else None

    def _advance(self) -> None:
        """Decode one frame and place its samples."""
        timed = next(self._frames, None)
        if timed is None:
            self._flush()
            self.finished = True
            return
        time_s, frame = timed
        audio_format = frame.sample_rate, frame.layout.name, frame.layout.nb_channels, frame.format.name
        deviation_s = time_s - self._expected_s
        self._drift_s += _DRIFT_RATE * (deviation_s - self._drift_s)
        if audio_format != self._format or abs(deviation_s) > _GAP_S:
            self._restart(time_s, frame, audio_format)
        elif abs(self._drift_s) > _DRIFT_S:
            self._restart(self._expected_s + self._drift_s, frame, audio_format)
        self._expected_s += frame.samples / frame.sample_rate
        assert self._resampler is not None
        for resampled in self._resampler.resample(frame):
            self._append(resampled)

    def _restart(self, time_s: float, frame: AudioFrame, audio_format: tuple[int, str, int, str]) -> None:
        """Place the samples of a frame and the following ones from a time on."""
        self._flush()
        self.format_changes += self._format not in (None, audio_format)
        self._format = audio_format
        self._resampler = AudioResampler(format="flt", rate=self.rate_hz)  # PyAV reads no more than eight planes.
        weights = mix_weights([channel.name for channel in frame.layout.channels])
        self._weights = np.stack([weights, np.eye(len(weights), dtype=np.float32)[0]])
        self._expected_s, self._drift_s = time_s, 0.0
        self._next_sample = round(time_s * self.rate_hz)

    def _flush(self) -> None:
        if self._resampler is not None:
            for resampled in self._resampler.resample(None):
                self._append(resampled)
            self._resampler = None

    def _append(self, frame: AudioFrame) -> None:
        channels = frame.to_ndarray().reshape(-1, self._weights.shape[1]).T
        start, placed = self._next_sample, round(self.end_s * self.rate_hz)
        self._next_sample += channels.shape[1]
        channels = channels[:, max(0, placed - start) :]  # Repeated samples are dropped.
        if channels.shape[1]:
            start = max(start, placed)
            self._pieces.append((start, self._weights @ channels))
            self.end_s = (start + channels.shape[1]) / self.rate_hz
