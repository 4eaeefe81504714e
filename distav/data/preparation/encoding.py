"""Clips and features before they are written to shards, and the encoding of clips by PyAV and libsndfile."""

import io
from dataclasses import dataclass, field
from fractions import Fraction

import av
import av.error
import numpy as np
import soundfile
from av.video.stream import VideoStream

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.manifest import VIDEO_EXTENSIONS
from distav.data.pipeline.features import encode_features

CODECS = tuple(VIDEO_EXTENSIONS)
MODALITY_CHOICES = ("both", "any")
"""Values of `Encoding.modalities`."""
OMIT_DEFAULT = "omit_default"
"""Metadata of a field that a recipe contains only if its value differs from the default."""
KEYFRAME_INTERVAL = 12
"""Frames between key frames; small, so that a few frames can be read without decoding the complete clip."""


ANY_HINT = "--modalities any accepts clips without video or without audio"
"""End of the reason why a clip with one modality is rejected."""


class RejectedClip(Exception):
    """A clip that cannot be used; the message is the reason in rejected.csv."""


@dataclass(frozen=True)
class ClipSource:
    """A candidate: a file, an interval of it, or something to render.

    Attributes:
        source: path or name, written to the index.
        label: its class; for multi-label sources all of its classes, separated by `multi_labels.LABEL_SEPARATOR`.
        split: name of its split.
        start_s, end_s: interval in seconds; None: to the end of the file.
        detail: anything else that the source needs to make the clip.
    """

    source: str
    label: str
    split: str
    start_s: float = 0.0
    end_s: float | None = None
    detail: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A decoded clip.

    Attributes:
        frames: [T, H, W, 3] uint8 at the frame rate of the dataset; None: the clip has no video.
        waveform: [N] float32 in [-1, 1], mono, at the sample rate of the dataset; None: the clip has no audio.
        start_s: position in the source.
        repairs: what was done to a damaged or incomplete source.
    """

    frames: np.ndarray | None
    waveform: np.ndarray | None
    start_s: float = 0.0
    repairs: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels; 0 without video."""
        return (0, 0) if self.frames is None else (self.frames.shape[1], self.frames.shape[2])

    def members(self, encoding: "Encoding") -> dict[str, bytes]:
        """Return the encoded members of the sample by name.

        Raises:
            RejectedClip: if the clip lacks a modality, unless `encoding` allows it, or has none, or if it cannot be
                encoded.
        """
        members: dict[str, bytes] = {}
        try:
            if self.frames is not None:
                members["video"] = encode_video(self.frames, encoding)
            if self.waveform is not None:
                members["audio"] = encode_audio(self.waveform, encoding.sample_rate_hz)
        except (av.error.FFmpegError, soundfile.SoundFileError, ValueError, MemoryError) as error:
            raise RejectedClip(f"not supported: the clip cannot be encoded: {error}") from None
        for name in ("video", "audio"):
            if name not in members and (encoding.modalities == "both" or not members):
                hint = f"; {ANY_HINT}" if members else ""
                raise RejectedClip(f"no {name}: the source yields no {name}{hint}")
        return members


@dataclass(frozen=True)
class Features:
    """Features of a clip, computed by frozen networks.

    Attributes:
        streams: [steps, dim] float16 or float32 by name of the stream.
        start_s: position in the source.
        size: height and width in pixels; 0 for features.
        repairs: what was done to a damaged or incomplete source.
    """

    streams: dict[str, np.ndarray]
    start_s: float = 0.0
    size: tuple[int, int] = (0, 0)
    repairs: tuple[str, ...] = ()

    def members(self, encoding: "Encoding") -> dict[str, bytes]:
        """Return the encoded members of the sample by name; the encoding of clips is not used."""
        del encoding
        return {name: encode_features(values) for name, values in self.streams.items()}


@dataclass(frozen=True)
class Encoding:
    """How clips are stored.

    Attributes:
        codec: video codec.
        fps: frames per second.
        short_side: shorter side of the frames in pixels.
        clip_s: duration of a clip.
        sample_rate_hz: audio sample rate.
        modalities: `both`: every clip has video and audio; `any`: a clip may lack one of them.
    """

    codec: str = "mjpeg"
    fps: float = 8.0
    short_side: int = 128
    clip_s: float = 2.0
    sample_rate_hz: int = 16000
    modalities: str = field(default="both", metadata={OMIT_DEFAULT: True})

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(
                f"--codec={self.codec}: allowed: {format_list(CODECS)}.{did_you_mean(self.codec, CODECS)} "
                "MJPEG: fastest decoding on CPUs. VP9: smaller files, decoded on any machine. H.264: smallest files, "
                "for decoding on GPUs."
            )
        if self.modalities not in MODALITY_CHOICES:
            raise UserError(
                f"--modalities={self.modalities}: allowed: {format_list(MODALITY_CHOICES)}."
                f"{did_you_mean(self.modalities, MODALITY_CHOICES)} both: clips have video and audio. any: a clip may "
                "have one of them."
            )
        for name, value in (("fps", self.fps), ("clip-s", self.clip_s), ("sample-rate", self.sample_rate_hz)):
            if value <= 0:
                raise UserError(f"--{name}={value}: has to be above 0.")
        if self.short_side < 16:
            raise UserError(f"--short-side={self.short_side}: has to be 16 or more.")
        if self.num_frames < 1:
            raise UserError(
                f"--clip-s={self.clip_s}: the clip has no frame at --fps={self.fps}; increase one of the two options."
            )

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return round(self.clip_s * self.fps)

    @property
    def num_audio_samples(self) -> int:
        """Audio samples of a clip."""
        return round(self.clip_s * self.sample_rate_hz)

    @property
    def side(self) -> int:
        """Side of square frames in pixels."""
        return self.size_of(self.short_side, self.short_side)[0]

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the stored width and height: the shorter one is `short_side`, the aspect ratio is kept.

        Both are multiples of 2; multiples of 16 for H.264, whose macroblocks have 16 x 16 pixels: for other sizes
        NVDEC creates a new decoder for each clip.
        """
        scale, step = self.short_side / min(width, height), 16 if self.codec == "h264" else 2
        stored_width = max(step, step * round(width * scale / step))
        stored_height = max(step, step * round(height * scale / step))
        return stored_width, stored_height


def encode_video(frames: np.ndarray, encoding: Encoding) -> bytes:
    """Encode frames [T, H, W, 3] uint8 as a file without audio; equal frames give equal bytes."""
    name, pixel_format, options = {
        "mjpeg": ("mjpeg", "yuvj420p", {"qmin": "3", "qmax": "3"}),
        "vp9": ("libvpx-vp9", "yuv420p", {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "6"}),
        "h264": ("libx264", "yuv420p", {"crf": "20", "preset": "veryfast", "bf": "0", "tune": "fastdecode"}),
    }[encoding.codec]
    file = io.BytesIO()
    container_format = VIDEO_EXTENSIONS[encoding.codec]
    with av.open(file, "w", format=container_format, container_options={"fflags": "bitexact"}) as container:
        rate = Fraction(encoding.fps).limit_denominator(1001)
        stream = container.add_stream(name, rate=rate, options=options | {"flags": "+bitexact"})
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size = KEYFRAME_INTERVAL
        stream.codec_context.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def encode_audio(waveform: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encode a mono waveform [N] float32 in [-1, 1] as 16-bit FLAC."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(waveform, -1, 1), sample_rate_hz, format="FLAC", subtype="PCM_16")
    return file.getvalue()
