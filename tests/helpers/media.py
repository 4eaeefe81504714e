"""Media files with flashes and beeps at the same times, and the times at which they are found in clips."""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.stream import Disposition
from av.video.stream import VideoStream

from distav.data.preparation.encoding import Clip, Encoding

CODECS = {
    ".mp4": ("mpeg4", "aac"),
    ".m4v": ("mpeg4", "aac"),
    ".mov": ("mpeg4", "aac"),
    ".3gp": ("mpeg4", "aac"),
    ".mkv": ("mpeg4", "flac"),
    ".webm": ("libvpx", "libopus"),
    ".avi": ("mpeg4", "pcm_s16le"),
    ".ts": ("mpeg2video", "mp2"),
    ".mpg": ("mpeg2video", "mp2"),
    ".flv": ("flv", "mp3"),
    ".wmv": ("wmv2", "wmav2"),
}
"""Video and audio codec by container."""
AUDIO_CODECS = {".wav": "pcm_s16le", ".mp3": "mp3", ".flac": "flac", ".m4a": "aac", ".ogg": "libopus", ".aac": "aac"}
"""Codec of audio files by suffix."""
EVENT_S = 0.2
"""Duration of a flash and a beep."""
BEEP_HZ = 1000


def write_media(
    path: Path,
    seconds: float,
    *,
    fps: int = 25,
    size: tuple[int, int] = (48, 32),
    rate_hz: int = 48000,
    layout: str = "mono",
    every_s: float = 3.0,
    audio_seconds: float | None = None,
    frame_times: Iterable[float] | None = None,
    dropped: Callable[[int], bool] | None = None,
    pixels: np.ndarray | None = None,
    signal: Callable[[np.ndarray], np.ndarray] | None = None,
    edit: Callable[[str, float], float | None] | None = None,
    aspect_ratio: Fraction | None = None,
    matrix: Sequence[int] | None = None,
) -> Path:
    """Write a file with a flash and a beep after one second and every `every_s` seconds from there on.

    Args:
        path: the file; its suffix determines the container and the codecs.
        seconds: duration of the video.
        fps: frame rate.
        size: width and height.
        rate_hz: sample rate.
        layout: channels.
        every_s: distance of the events.
        audio_seconds: duration of the audio, if it differs.
        frame_times: times of the frames, if they are no multiples of 1 / fps.
        dropped: function of the number of a frame that returns whether it is left out.
        pixels: [H, W, 3] uint8, shown instead of black and white.
        signal: function of times [N] that returns samples [C, N] float32, instead of the beeps.
        edit: function of `video` or `audio` and the time of a packet that returns its new time; None to drop it.
        aspect_ratio: aspect ratio of a pixel.
        matrix: the entries a, b, c, d of the display matrix.
    """
    video_codec, audio_codec = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        video = container.add_stream(video_codec, rate=fps, options={"g": "12" if path.suffix == ".mpg" else "1"})
        video.width, video.height, video.pix_fmt, video.bit_rate = *size, "yuv420p", 400_000
        video.codec_context.time_base = Fraction(1, 60000) if frame_times is not None else Fraction(1, fps)
        if aspect_ratio:
            video.codec_context.sample_aspect_ratio = aspect_ratio
        if matrix:
            a, b, c, d = (value << 16 for value in matrix)
            video.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        audio = container.add_stream(audio_codec, rate=rate_hz, layout=layout)
        audio.bit_rate = 128_000
        packets = []
        if frame_times is None:
            frame_times = (number / fps for number in range(round(seconds * fps)) if not (dropped and dropped(number)))
        for time_s in frame_times:
            shade = 235 if _is_event(np.array(time_s + 1e-6), every_s) else 16
            image = pixels if pixels is not None else np.full((size[1], size[0], 3), shade, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.time_base = video.codec_context.time_base
            frame.pts = round(time_s / frame.time_base)
            packets += video.encode(frame)
        packets += video.encode()
        packets += _encode_audio(audio, audio_seconds or seconds, rate_hz, layout, every_s, signal)
        packets = [packet for packet in packets if packet.size]
        for packet in sorted(packets, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
            if edit is not None:
                time_s = float(packet.pts * packet.time_base)
                if (edited_s := edit(packet.stream.type, time_s)) is None:
                    continue
                shift = round((edited_s - time_s) / packet.time_base)
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            container.mux(packet)
    return path


def copy_stream(source: Path, path: Path, kind: str) -> Path:
    """Write a file with the `video` or the `audio` stream of another file alone."""
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        template = getattr(read.streams, kind)[0]
        stream = written.add_stream_from_template(template)
        for packet in read.demux(template):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    return path


def write_silent(path: Path, seconds: float, **options: Any) -> Path:
    """Write a video without audio; options as of `write_media`."""
    both = write_media(path.with_name(f"both-{path.name}"), seconds, **options)
    copy_stream(both, path, "video")
    both.unlink()
    return path


def write_audio(
    path: Path,
    seconds: float,
    *,
    rate_hz: int = 48000,
    every_s: float = 3.0,
    cover: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Write an audio file with the beeps of `write_media`.

    Args:
        path: the file; its suffix determines the codec.
        seconds: duration.
        rate_hz: sample rate.
        every_s: distance of the beeps.
        cover: whether the file has a cover image.
        options: options of FFmpeg's writer.
    """
    with av.open(str(path), "w", options=options or {}) as container:
        audio = container.add_stream(AUDIO_CODECS[path.suffix], rate=rate_hz, layout="mono")
        assert isinstance(audio, AudioStream)
        if cover:
            image = container.add_stream("mjpeg")
            assert isinstance(image, VideoStream)
            image.width, image.height, image.pix_fmt = 64, 64, "yuvj420p"
            image.disposition = Disposition.attached_pic
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), format="rgb24")
            frame.pts = 0
            for packet in [*image.encode(frame), *image.encode()]:
                container.mux(packet)
        for packet in _encode_audio(audio, seconds, rate_hz, "mono", every_s, None):
            container.mux(packet)
    return path


def event_times(clips: Iterable[Clip], encoding: Encoding) -> tuple[list[float], list[float]]:
    """Return the start times of flashes and beeps in clips, in seconds of the file; clips may lack a modality."""
    flashes, beeps = [], []
    for clip in clips:
        if clip.frames is not None:
            bright = np.flatnonzero(clip.frames.mean((1, 2, 3)) > 120)
            flashes += (clip.start_s + bright / encoding.fps).tolist()
        if clip.waveform is not None:
            loud = np.flatnonzero(np.abs(clip.waveform) > 0.1)
            beeps += (clip.start_s + loud / encoding.sample_rate_hz).tolist()
    return _starts(flashes), _starts(beeps)


def _encode_audio(
    stream: AudioStream,
    seconds: float,
    rate_hz: int,
    layout: str,
    every_s: float,
    signal: Callable[[np.ndarray], np.ndarray] | None,
) -> list[av.Packet]:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    num_channels = av.AudioLayout(layout).nb_channels
    if signal is None:
        beep = 0.5 * np.sin(2 * np.pi * BEEP_HZ * time_s) * _is_event(time_s, every_s)
        samples = np.tile(beep, (num_channels, 1))
    else:
        samples = signal(time_s)
    resampler = av.AudioResampler(
        format=stream.codec_context.format,
        layout=layout,
        rate=rate_hz,
        frame_size=stream.codec_context.frame_size or 1152,
    )
    packets = []
    for start in range(0, samples.shape[1], 8192):
        content = samples[:, start : start + 8192].T.astype(np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(content), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, start, Fraction(1, rate_hz)
        for resampled in resampler.resample(frame):
            packets += stream.encode(resampled)
    for resampled in resampler.resample(None):
        packets += stream.encode(resampled)
    return packets + stream.encode(None)


def _is_event(time_s: np.ndarray, every_s: float) -> np.ndarray:
    return (time_s >= 1) & ((time_s - 1) % every_s < EVENT_S)


def _starts(times: list[float]) -> list[float]:
    """Return the times that follow none within half a second."""
    return [time_s for previous, time_s in zip([-1.0, *times], times, strict=False) if time_s - previous > 0.5]
