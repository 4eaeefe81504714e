"""Small versions of clips for the audit page: a strip of frames as WebP, audio as Opus in WebM.

Legend: T frames, H W pixels, N audio samples.
"""

import io
from fractions import Fraction

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from PIL import Image

STRIP_FRAMES = 4
"""Number of frames in a strip, evenly distributed over the clip."""
_OPUS_RATES_HZ = (8000, 12000, 16000, 24000, 48000)


def encode_strip(frames: np.ndarray, height: int) -> bytes:
    """Return frames side by side as WebP, each cropped to a square.

    Args:
        frames: [T, H, W, 3] uint8.
        height: largest height of the strip in pixels; smaller frames are not enlarged.
    """
    numbers = ((np.arange(STRIP_FRAMES) + 0.5) * len(frames) / STRIP_FRAMES).astype(int)
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    squares = frames[numbers, top : top + side, left : left + side].copy()
    squares[:, :, -max(1, side // 48) :] = 128  # separates the frames
    image = Image.fromarray(np.concatenate(list(squares), axis=1))
    if side > height:
        image = image.resize((STRIP_FRAMES * height, height), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=60, method=2)
    return buffer.getvalue()


def encode_opus(audio: np.ndarray, sample_rate_hz: int, bit_rate: int = 16_000) -> bytes:
    """Return mono audio [N] float32 in [-1, 1] as Opus in WebM, which browsers play."""
    rate = sample_rate_hz if sample_rate_hz in _OPUS_RATES_HZ else 48000
    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    source = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio[None], np.float32), format="flt", layout="mono")
    source.sample_rate, source.pts, source.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm", container_options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("libopus", rate=rate, options={"flags": "+bitexact"})
        assert isinstance(stream, AudioStream)
        stream.layout, stream.format, stream.bit_rate = "mono", "flt", bit_rate
        for frame in (*resampler.resample(source), *resampler.resample(None)):
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()
