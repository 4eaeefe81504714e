"""Clips out of the files people have: any container and codec that FFmpeg reads, by PyAV."""

from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame

from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip

_MEDIA_MARKS = (b"ftyp", b"RIFF", b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"moov", b"mdat")


def decode_clips(path: Path, candidate: ClipSource, encoding: Encoding) -> Iterator[Clip]:
    """Cut a file, or a stretch of it, into consecutive clips of the wanted length.

    Raises:
        Unusable: missing, truncated, not a video, without picture, without sound, or too short.
    """
    if not path.is_file():
        raise RejectedClip("missing: no such file")
    try:
        with av.open(str(path)) as container:
            frames = _frames(container, candidate, encoding)
        with av.open(str(path)) as container:
            sound = _sound(container, candidate, encoding)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise RejectedClip(f"{_damage(path)}: {getattr(error, 'strerror', None) or error}") from None
    length = min(len(frames) / encoding.fps, len(sound) / encoding.sample_rate_hz)
    count = int(length / encoding.clip_s + 1e-6)
    if (
        not count
        and (len(sound) + 1) / encoding.sample_rate_hz > encoding.clip_s - 0.1
        and len(frames) >= encoding.num_frames
    ):
        count = 1  # Audio coders drop or delay some milliseconds; the rest is padded.
    if not count:
        raise RejectedClip(f"too short: {length:.2f} s of picture and sound, a clip takes {encoding.clip_s:g} s")
    for number in range(count):
        first, start = number * encoding.num_frames, number * encoding.num_audio_samples
        piece = sound[start : start + encoding.num_audio_samples]
        yield Clip(
            frames[first : first + encoding.num_frames],
            np.pad(piece, (0, encoding.num_audio_samples - len(piece))),
            candidate.start_s + number * encoding.clip_s,
        )


def _frames(container: InputContainer, candidate: ClipSource, encoding: Encoding) -> np.ndarray:
    """Return the frames of the stretch at the wanted rate and size, [T, H, W, 3] uint8."""
    streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not streams:
        raise RejectedClip("no picture: the file has no video stream")
    stream = streams[0]
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = 1
    if candidate.start_s > 1:
        container.seek(int((candidate.start_s - 1) * av.time_base))
    origin = (container.start_time or 0) / av.time_base
    kept: list[np.ndarray] = []
    shown: VideoFrame | None = None
    last_s = -1.0
    step = 1 / float(stream.average_rate or stream.guessed_rate or encoding.fps)
    for frame in container.decode(stream):
        now = (frame.time if frame.time is not None else last_s + step) - origin
        last_s = now
        # The frame on screen at each wanted moment is the newest one that has begun by then.
        while shown is not None and (wanted := candidate.start_s + len(kept) / encoding.fps) < now - 1e-6:
            if candidate.end_s is not None and wanted >= candidate.end_s - 1e-6:
                break
            kept.append(_picture(shown, encoding))
        shown = frame
        if candidate.end_s is not None and now >= candidate.end_s:
            break
    if shown is None:
        raise RejectedClip("truncated: no frame could be decoded")
    end_s = last_s + step
    stop = min(end_s, candidate.end_s) if candidate.end_s is not None else end_s
    while candidate.start_s + len(kept) / encoding.fps < stop - 1e-6:
        kept.append(_picture(shown, encoding))
    declared = float(container.duration or 0) / av.time_base
    needed = min(declared, candidate.end_s) if candidate.end_s is not None else declared
    if stream.frames > 1 and stream.average_rate:
        declared = max(0.0, min(declared, stream.frames / float(stream.average_rate)))
        needed = min(needed, declared)
    if end_s < needed - max(0.5, 2 * step):
        raise RejectedClip(f"truncated: {needed:.2f} s declared, {end_s:.2f} s decoded")
    if not kept:
        raise RejectedClip(
            f"too short: the stretch begins at {candidate.start_s:g} s, the picture ends at {end_s:.2f} s"
        )
    return np.stack(kept)


def _picture(frame: VideoFrame, encoding: Encoding) -> np.ndarray:
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    width, height = encoding.size_of(frame.width, frame.height)
    image = frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()
    return np.rot90(image, turns) if turns else image


def _sound(container: InputContainer, candidate: ClipSource, encoding: Encoding) -> np.ndarray:
    """Return the mono sound of the stretch, [N] float32."""
    if not container.streams.audio:
        raise RejectedClip("no sound: the file has no audio stream")
    stream = container.streams.audio[0]
    if candidate.start_s > 1:
        container.seek(int((candidate.start_s - 1) * av.time_base))
    resampler = AudioResampler(format="flt", layout="mono", rate=encoding.sample_rate_hz)
    pieces: list[np.ndarray] = []
    begins: float | None = None
    for frame in container.decode(stream):
        if frame.time is not None and begins is None:
            begins = frame.time
        if candidate.end_s is not None and (frame.time or 0) > candidate.end_s + 0.5:
            break
        pieces += [each.to_ndarray().reshape(-1) for each in resampler.resample(frame)]
    pieces += [each.to_ndarray().reshape(-1) for each in resampler.resample(None)]
    sound = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not len(sound):
        raise RejectedClip("no sound: no audio could be decoded")
    rate = encoding.sample_rate_hz
    origin = (container.start_time or 0) / av.time_base
    lead = round(((begins or 0.0) - origin - candidate.start_s) * rate)
    sound = np.pad(sound, (lead, 0)) if lead > 0 else sound[-lead:]
    if candidate.end_s is not None:
        sound = sound[: round((candidate.end_s - candidate.start_s) * rate)]
    return sound


def _damage(path: Path) -> str:
    """Tell a damaged media file from something else by its first bytes."""
    head = path.open("rb").read(16)
    if not head:
        return "truncated: the file is empty"
    return "truncated" if any(mark in head for mark in _MEDIA_MARKS) else "not a video"
