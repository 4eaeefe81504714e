"""Decoding of media files into clips, in all containers and codecs that FFmpeg reads, by PyAV."""

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

_MEDIA_SIGNATURES = (b"ftyp", b"RIFF", b"\x1aE\xdf\xa3", b"OggS", b"FLV", b"\x00\x00\x01\xba", b"moov", b"mdat")


def decode_clips(path: Path, candidate: ClipSource, encoding: Encoding) -> Iterator[Clip]:
    """Cut a file, or an interval of it, into consecutive clips.

    Raises:
        RejectedClip: if the file is missing, truncated, not a video, without video or audio stream, or too short.
    """
    if not path.is_file():
        raise RejectedClip("missing: no such file")
    try:
        with av.open(str(path)) as container:
            frames = _decode_video(container, candidate, encoding)
        with av.open(str(path)) as container:
            waveform = _decode_audio(container, candidate, encoding)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise RejectedClip(f"{_classify_damage(path)}: {getattr(error, 'strerror', None) or error}") from None
    duration_s = min(len(frames) / encoding.fps, len(waveform) / encoding.sample_rate_hz)
    count = int(duration_s / encoding.clip_s + 1e-6)
    if (
        not count
        and (len(waveform) + 1) / encoding.sample_rate_hz > encoding.clip_s - 0.1
        and len(frames) >= encoding.num_frames
    ):
        count = 1  # Audio codecs drop or delay some milliseconds; they are padded below.
    if not count:
        raise RejectedClip(f"too short: {duration_s:.2f} s of video and audio, a clip has {encoding.clip_s:g} s")
    for index in range(count):
        first_frame, first_sample = index * encoding.num_frames, index * encoding.num_audio_samples
        segment = waveform[first_sample : first_sample + encoding.num_audio_samples]
        yield Clip(
            frames[first_frame : first_frame + encoding.num_frames],
            np.pad(segment, (0, encoding.num_audio_samples - len(segment))),
            candidate.start_s + index * encoding.clip_s,
        )


def _decode_video(container: InputContainer, candidate: ClipSource, encoding: Encoding) -> np.ndarray:
    """Return the frames of the interval at the frame rate and size of the dataset, [T, H, W, 3] uint8."""
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise RejectedClip("no video: the file has no video stream")
    stream = streams[0]
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = 1
    if candidate.start_s > 1:
        container.seek(int((candidate.start_s - 1) * av.time_base))
    origin = (container.start_time or 0) / av.time_base
    kept: list[np.ndarray] = []
    current: VideoFrame | None = None
    last_s = -1.0
    step = 1 / float(stream.average_rate or stream.guessed_rate or encoding.fps)
    for frame in container.decode(stream):
        now = (frame.time if frame.time is not None else last_s + step) - origin
        last_s = now
        # The frame at each sampled time is the latest one that starts at or before it.
        while current is not None and (sample_s := candidate.start_s + len(kept) / encoding.fps) < now - 1e-6:
            if candidate.end_s is not None and sample_s >= candidate.end_s - 1e-6:
                break
            kept.append(_resize(current, encoding))
        current = frame
        if candidate.end_s is not None and now >= candidate.end_s:
            break
    if current is None:
        raise RejectedClip("truncated: no frame could be decoded")
    end_s = last_s + step
    stop_s = min(end_s, candidate.end_s) if candidate.end_s is not None else end_s
    while candidate.start_s + len(kept) / encoding.fps < stop_s - 1e-6:
        kept.append(_resize(current, encoding))
    declared_s = float(container.duration or 0) / av.time_base
    expected_s = min(declared_s, candidate.end_s) if candidate.end_s is not None else declared_s
    if stream.frames > 1 and stream.average_rate:
        declared_s = max(0.0, min(declared_s, stream.frames / float(stream.average_rate)))
        expected_s = min(expected_s, declared_s)
    if end_s < expected_s - max(0.5, 2 * step):
        raise RejectedClip(f"truncated: {expected_s:.2f} s declared, {end_s:.2f} s decoded")
    if not kept:
        raise RejectedClip(
            f"too short: the interval starts at {candidate.start_s:g} s, the video ends at {end_s:.2f} s"
        )
    return np.stack(kept)


def _resize(frame: VideoFrame, encoding: Encoding) -> np.ndarray:
    """Return a frame [H, W, 3] uint8 in the stored size, upright."""
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    width, height = encoding.size_of(frame.width, frame.height)
    image = frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()
    return np.rot90(image, quarter_turns) if quarter_turns else image


def _decode_audio(container: InputContainer, candidate: ClipSource, encoding: Encoding) -> np.ndarray:
    """Return the mono waveform of the interval at the sample rate of the dataset, [N] float32."""
    if not container.streams.audio:
        raise RejectedClip("no audio: the file has no audio stream")
    stream = container.streams.audio[0]
    if candidate.start_s > 1:
        container.seek(int((candidate.start_s - 1) * av.time_base))
    resampler = AudioResampler(format="flt", layout="mono", rate=encoding.sample_rate_hz)
    parts: list[np.ndarray] = []
    first_s: float | None = None
    for frame in container.decode(stream):
        if frame.time is not None and first_s is None:
            first_s = frame.time
        if candidate.end_s is not None and (frame.time or 0) > candidate.end_s + 0.5:
            break
        parts += [resampled.to_ndarray().reshape(-1) for resampled in resampler.resample(frame)]
    parts += [resampled.to_ndarray().reshape(-1) for resampled in resampler.resample(None)]
    waveform = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not len(waveform):
        raise RejectedClip("no audio: no audio could be decoded")
    rate = encoding.sample_rate_hz
    origin = (container.start_time or 0) / av.time_base
    lead = round(((first_s or 0.0) - origin - candidate.start_s) * rate)
    waveform = np.pad(waveform, (lead, 0)) if lead > 0 else waveform[-lead:]
    if candidate.end_s is not None:
        waveform = waveform[: round((candidate.end_s - candidate.start_s) * rate)]
    return waveform


def _classify_damage(path: Path) -> str:
    """Return whether an unreadable file is a truncated media file or not a video, by its first bytes."""
    head = path.open("rb").read(16)
    if not head:
        return "truncated: the file is empty"
    return "truncated" if any(signature in head for signature in _MEDIA_SIGNATURES) else "not a video"
