"""A clip on its way into a shard, and its encoding by PyAV and libsndfile."""

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import soundfile
from av.video.stream import VideoStream

from distav.config.errors import UserError, did_you_mean, format_list
from distav.data.dataset import VIDEO_EXTENSIONS
from distav.data.pipeline.features import encode_features

CODECS = tuple(VIDEO_EXTENSIONS)
KEYFRAME_INTERVAL = 12
"""Frames between key frames: short, so that a few frames can be had without decoding the whole clip."""


class RejectedClip(Exception):
    """A clip that cannot be used; the message is the reason that rejected.csv gives."""


@dataclass(frozen=True)
class ClipSource:
    """What a clip is to be made from: a file, a stretch of it, or something to render."""

    source: str
    label: str
    """Its class; of a source with several a sample, all of them with commas in between."""
    split: str
    start_s: float = 0.0
    end_s: float | None = None
    detail: tuple[str | int, ...] = ()


@dataclass(frozen=True)
class Clip:
    """A decoded clip: frames [T, H, W, 3] uint8 at the set's rate, sound [N] float32 in [-1, 1], mono."""

    frames: np.ndarray
    waveform: np.ndarray
    start_s: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.frames.shape[1], self.frames.shape[2]

    def members(self, encoding: "Encoding") -> dict[str, bytes]:
        """Return the members of the sample by name."""
        return {
            "video": encode_video(self.frames, encoding),
            "audio": encode_audio(self.waveform, encoding.sample_rate_hz),
        }


@dataclass(frozen=True)
class Features:
    """What frozen networks gave of a clip: [steps, dim] float16 or float32 of each stream."""

    streams: dict[str, np.ndarray]
    start_s: float = 0.0
    size: tuple[int, int] = (0, 0)

    def members(self, encoding: "Encoding") -> dict[str, bytes]:
        """Return the members of the sample by name."""
        del encoding
        return {name: encode_features(values) for name, values in self.streams.items()}


@dataclass(frozen=True)
class Encoding:
    """How clips are stored."""

    codec: str = "mjpeg"
    fps: float = 8.0
    short_side: int = 128
    clip_s: float = 2.0
    sample_rate_hz: int = 16000

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise UserError(
                f"--codec={self.codec}: allowed: {format_list(CODECS)}.{did_you_mean(self.codec, CODECS)} MJPEG decodes fastest "
                "on a CPU and anywhere, VP9 is smaller and decodes anywhere, H.264 is smallest to make and wants a GPU."
            )
        for name, value in (("fps", self.fps), ("clip-s", self.clip_s), ("sample-rate", self.sample_rate_hz)):
            if value <= 0:
                raise UserError(f"--{name}={value}: has to be above 0.")
        if self.short_side < 16:
            raise UserError(f"--short-side={self.short_side}: has to be 16 or more.")
        if self.num_frames < 1:
            raise UserError(f"--clip-s={self.clip_s} holds no frame at --fps={self.fps}; make one of them larger.")

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
        """Return width and height with the short side as wanted and the aspect kept.

        Both are multiples of 2; of 16 for H.264, whose frames are coded in blocks of 16 x 16 pixels: of other sizes
        NVDEC makes a new decoder for each clip.
        """
        scale, step = self.short_side / min(width, height), 16 if self.codec == "h264" else 2
        wide, high = (max(step, step * round(side * scale / step)) for side in (width, height))
        return wide, high


def encode_video(frames: np.ndarray, encoding: Encoding) -> bytes:
    """Encode frames [T, H, W, 3] uint8 as a picture-only file; the same frames always give the same bytes."""
    name, pixels, options = {
        "mjpeg": ("mjpeg", "yuvj420p", {"qmin": "3", "qmax": "3"}),
        "vp9": ("libvpx-vp9", "yuv420p", {"crf": "30", "b": "0", "deadline": "realtime", "cpu-used": "6"}),
        "h264": ("libx264", "yuv420p", {"crf": "20", "preset": "veryfast", "bf": "0", "tune": "fastdecode"}),
    }[encoding.codec]
    sink = io.BytesIO()
    kind = VIDEO_EXTENSIONS[encoding.codec]
    with av.open(sink, "w", format=kind, container_options={"fflags": "bitexact"}) as container:
        rate = Fraction(encoding.fps).limit_denominator(1001)
        stream = container.add_stream(name, rate=rate, options=options | {"flags": "+bitexact"})
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = KEYFRAME_INTERVAL
        stream.codec_context.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return sink.getvalue()


def encode_audio(sound: np.ndarray, sample_rate_hz: int) -> bytes:
    """Encode mono sound [N] float32 in [-1, 1] as 16-bit FLAC."""
    sink = io.BytesIO()
    soundfile.write(sink, np.clip(sound, -1, 1), sample_rate_hz, format="FLAC", subtype="PCM_16")
    return sink.getvalue()
