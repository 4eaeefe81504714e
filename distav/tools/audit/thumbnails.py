"""Clips made small for a page: a strip of frames as WebP, sound as Opus in WebM.

Legend: T frames, H W pixels, N audio samples.
"""

import io
from fractions import Fraction

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from PIL import Image

STRIP = 4
"""Frames of a strip, evenly spread over the clip."""
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


def strip(frames: np.ndarray, height: int) -> bytes:
    """Return frames side by side, each cut to a square, as WebP: [T, H, W, 3] uint8 in; sides are never enlarged."""
    places = ((np.arange(STRIP) + 0.5) * len(frames) / STRIP).astype(int)
    side = min(frames.shape[1:3])
    top, left = ((size - side) // 2 for size in frames.shape[1:3])
    squares = frames[places, top : top + side, left : left + side].copy()
    squares[:, :, -max(1, side // 48) :] = 128  # where one ends
    image = Image.fromarray(np.concatenate(list(squares), axis=1))
    if side > height:
        image = image.resize((STRIP * height, height), Image.Resampling.BOX)
    sink = io.BytesIO()
    image.save(sink, "webp", quality=60, method=2)
    return sink.getvalue()


def small_sound(sound: np.ndarray, sample_rate_hz: int, bit_rate: int = 16_000) -> bytes:
    """Return mono sound [N] float32 in [-1, 1] as Opus in WebM, which browsers play."""
    rate = next((each for each in _OPUS_RATES if each == sample_rate_hz), 48000)
    resampler = AudioResampler(format="flt", layout="mono", rate=rate)
    source = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[None], np.float32), format="flt", layout="mono")
    source.sample_rate, source.pts, source.time_base = sample_rate_hz, 0, Fraction(1, sample_rate_hz)
    sink = io.BytesIO()
    with av.open(sink, "w", format="webm", container_options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("libopus", rate=rate, options={"flags": "+bitexact"})
        assert isinstance(stream, AudioStream)
        stream.layout, stream.format, stream.bit_rate = "mono", "flt", bit_rate
        for frame in (*resampler.resample(source), *resampler.resample(None)):
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return sink.getvalue()
