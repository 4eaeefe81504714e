"""Cutting of media files into clips, in all containers and codecs that FFmpeg reads, by PyAV.

Video and audio are cut at the same times by one clock: clip k of a file covers the seconds from k * clip_s to
(k + 1) * clip_s. Its frame i is the one that is displayed in the middle of the i-th frame interval, and its samples are
those of its seconds. A clip is yielded as soon as it is complete, so that memory does not depend on the length of the
file. If `Encoding.modalities` allows it, files with one of the two streams are cut by the same rules.
"""

from collections.abc import Iterator
from pathlib import Path

import av.error
import numpy as np

from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.track_pair import open_tracks

MAX_MISSING = 0.1
"""Fraction of a clip that may be missing at the end of a stream; it is filled with the last frame and silence."""
_MIN_TOLERANCE_S = 0.1
"""The same in seconds at least: audio codecs drop or delay some milliseconds."""
_MAX_HOLE = 0.5
"""Fraction of a clip in which no stream may have content."""
_MIN_USABLE = 0.5
"""Fraction of the declared duration that has to be decodable."""
_MIN_REPORTED_S = 0.02
_MEDIA_SIGNATURES = (b"ftyp", b"RIFF", b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"moov", b"mdat")


def decode_clips(path: Path, candidate: ClipSource, encoding: Encoding, audio: Path | None = None) -> Iterator[Clip]:
    """Cut a file, or an interval of it, into consecutive clips.

    Args:
        path: the file.
        candidate: interval and name of the file.
        encoding: rates, size and duration of the clips.
        audio: file of the audio, which starts at the same time; None: the audio is in `path`.

    Raises:
        RejectedClip: if the file is missing, truncated, not a video, without a stream that the clips need, too short,
            or mostly damaged; clips that were yielded before are then not to be used either.
    """
    if not path.is_file():
        raise RejectedClip("missing: no such file")
    try:
        cutter = _Cutter(path, candidate, encoding, audio)
        try:
            yield from cutter.clips()
        finally:
            cutter.close()
    except RejectedClip:
        raise
    except MemoryError:
        raise RejectedClip("too large: not enough memory to decode a frame") from None
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise RejectedClip(f"{_classify_damage(path)}: {getattr(error, 'strerror', None) or error}") from None
    except Exception as error:  # noqa: BLE001  # A failure of one file must not end the command.
        raise RejectedClip(f"not decodable: {type(error).__name__}: {error}") from None


class _Cutter:
    """Reads the streams of a file in step, one clip at a time."""

    def __init__(self, path: Path, candidate: ClipSource, encoding: Encoding, audio: Path | None):
        self.candidate, self.encoding = candidate, encoding
        self.tracks = open_tracks(path, audio, candidate.start_s, encoding)
        self.tolerance_s = max(_MIN_TOLERANCE_S, MAX_MISSING * encoding.clip_s)
        self._counters = (0, 0, 0)

    def close(self) -> None:
        """Close the file."""
        self.tracks.close()

    def clips(self) -> Iterator[Clip]:
        """Yield the clips whose seconds all streams cover."""
        index = num_clips = 0
        while True:
            start_s = self.candidate.start_s + index * self.encoding.clip_s
            clip, resume_s = self._clip(start_s)
            if resume_s is None:
                break
            if clip is not None:
                num_clips += 1
                yield clip
            index = max(index + 1, int((resume_s - self.candidate.start_s) / self.encoding.clip_s + 1e-6))
        self._check_end(num_clips)

    def _clip(self, start_s: float) -> tuple[Clip | None, float | None]:
        """Return the clip that starts at a time, and the time at which to continue.

        The clip is None in a hole of all streams, and both are None at the end of one.
        """
        encoding, video, audio = self.encoding, self.tracks.video, self.tracks.audio
        times = start_s + (np.arange(encoding.num_frames) + 0.5) / encoding.fps
        shown = [video.frame_at(time_s) for time_s in self._within(times)] if video else []
        first_sample = round(start_s * encoding.sample_rate_hz)
        waveform, present = audio.read(first_sample, encoding.num_audio_samples) if audio else (None, None)
        before, self._counters = self._counters, self.tracks.counters
        end_s, complete_s = self._end_s(), start_s + encoding.clip_s
        if end_s is not None and end_s < complete_s - self.tolerance_s:
            return None, None
        if self.candidate.end_s is not None and waveform is not None:
            kept = round(self.candidate.end_s * encoding.sample_rate_hz) - first_sample
            waveform[max(0, kept) :] = 0
        held = np.array([age_s for _, age_s in shown]) > video.hole_s if video else None
        if self._is_hole(held, present):
            next_starts = video.next_s if video else None, audio.next_start_s() if audio else None
            starts = [time_s for time_s in next_starts if time_s is not None]
            return None, max(complete_s, min(starts, default=complete_s))
        frames = video.images([frame for frame, _ in shown], encoding) if video else None
        repairs = self._repairs(before, present, held, complete_s)
        return Clip(frames, waveform, start_s, (*self.tracks.repairs, *repairs)), complete_s

    def _is_hole(self, held: np.ndarray | None, present: np.ndarray | None) -> bool:
        """Return whether no stream has content in most of a clip.

        Args:
            held: [T] bool, frames that are displayed for too long; None without video.
            present: [N] bool, samples that exist; None without audio.
        """
        num_frames = self.encoding.num_frames
        missing = np.ones(num_frames, dtype=bool) if held is None else held
        if present is not None:
            missing = missing & ~present[((np.arange(num_frames) + 0.5) / num_frames * len(present)).astype(int)]
        return bool(missing.mean() > _MAX_HOLE)

    def _within(self, times: np.ndarray) -> list[float]:
        """Return times, limited to the interval."""
        end_s = self.candidate.end_s
        return (times if end_s is None else np.minimum(times, end_s - 1e-3)).tolist()

    def _end_s(self) -> float | None:
        """Return the time from which on a stream has no content; None if it has not been reached."""
        video, audio = self.tracks.video, self.tracks.audio
        ends = [self.candidate.end_s]
        if video:
            ends.append(video.end_s)
        if audio and audio.finished:
            ends.append(audio.end_s)
        return min((end_s for end_s in ends if end_s is not None), default=None)

    def _repairs(
        self, before: tuple[int, int, int], present: np.ndarray | None, held: np.ndarray | None, complete_s: float
    ) -> list[str]:
        """Return what was done to a clip; see `_is_hole` for `held` and `present`."""
        repairs: list[str] = []
        damaged_video, damaged_audio, format_changes = np.subtract(self._counters, before).tolist()
        for kind, damaged in (("video", damaged_video), ("audio", damaged_audio)):
            if damaged:
                repairs.append(f"{kind}: {damaged} damaged packet{'s' if damaged > 1 else ''} skipped")
        if format_changes:
            repairs.append("audio: the format changes")
        if present is not None:
            missing_s = float((~present).sum()) / self.encoding.sample_rate_hz
            if missing_s > _MIN_REPORTED_S:
                repairs.append(f"audio: {missing_s:.2f} s missing, filled with silence")
        video = self.tracks.video
        if video and held is not None:
            past_s = complete_s - (video.end_s if video.end_s is not None else complete_s)
            if held.any() or past_s > _MIN_REPORTED_S:
                filled_s = max(past_s, held.mean() * self.encoding.clip_s)
                late = video.first_s is not None and video.first_s > complete_s - self.encoding.clip_s
                name = "first" if late else "last"
                repairs.append(f"video: {filled_s:.2f} s missing, filled with the {name} frame")
        return repairs

    def _check_end(self, num_clips: int) -> None:
        """Reject the file if it is mostly damaged or too short.

        Raises:
            RejectedClip: with the reason.
        """
        start_s, limit_s = self.candidate.start_s, self.candidate.end_s
        reached_s = self._end_s() or 0.0
        declared_s = min(track.declared_s for track in self.tracks)
        declared_s = declared_s if limit_s is None else min(declared_s, limit_s)
        if reached_s - start_s < _MIN_USABLE * (declared_s - start_s) and reached_s < declared_s - 0.5:
            raise RejectedClip(f"truncated: {declared_s:.2f} s declared, {reached_s:.2f} s decoded")
        if not num_clips:
            usable_s = max(0.0, reached_s - start_s)
            raise RejectedClip(
                f"too short: {usable_s:.2f} s of {self.tracks.names}, a clip has {self.encoding.clip_s:g} s"
            )


def _classify_damage(path: Path) -> str:
    """Return whether an unreadable file is a truncated media file or not a video, by its first bytes."""
    head = path.open("rb").read(16)
    if not head:
        return "truncated: the file is empty"
    return "truncated" if any(signature in head for signature in _MEDIA_SIGNATURES) else "not a video"
