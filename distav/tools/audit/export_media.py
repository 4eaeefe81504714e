"""Clips as files that browsers play: MP4 with H.264 video and AAC audio.

Legend: T frames, H W pixels, N audio samples.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

_AUDIO_RATE_HZ = 48_000
_EMPTY_SIDE = 128
"""Side of the gray frames of a clip without video."""
_CRF = "20"


def write_mp4(path: Path, frames: np.ndarray | None, audio: np.ndarray | None, fps: float, sample_rate_hz: int) -> None:
    """Write a clip; a clip without video gets gray frames, one without audio has no audio stream.

    Args:
        path: the file.
        frames: [T, H, W, 3] uint8; None without video.
        audio: [N] float32 in [-1, 1]; None without audio.
        fps: frames per second.
        sample_rate_hz: sample rate of the audio.
    """
    if frames is None:
        seconds = len(audio) / sample_rate_hz if audio is not None else 1.0
        frames = np.full((max(1, round(seconds * fps)), _EMPTY_SIDE, _EMPTY_SIDE, 3), 128, np.uint8)
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": _CRF})
        assert isinstance(video, VideoStream)
        # H.264 with subsampled colors needs even sides.
        video.height, video.width = (side + side % 2 for side in frames.shape[1:3])
        video.pix_fmt = "yuv420p"
        audio_stream = None
        if audio is not None:
            audio_stream = container.add_stream("aac", rate=_AUDIO_RATE_HZ)
            assert isinstance(audio_stream, AudioStream)
            audio_stream.layout = "mono"
        for frame in frames:
            padded = np.pad(frame, [(0, side % 2) for side in frame.shape[:2]] + [(0, 0)], mode="edge")
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")))
        container.mux(video.encode())
        if audio is not None and audio_stream is not None:
            resampler = AudioResampler(format="fltp", layout="mono", rate=_AUDIO_RATE_HZ)
            samples = np.ascontiguousarray(audio[None], np.float32)
            source = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
            source.sample_rate, source.pts, source.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
            for resampled in (*resampler.resample(source), *resampler.resample(None)):
                container.mux(audio_stream.encode(resampled))
            container.mux(audio_stream.encode())
