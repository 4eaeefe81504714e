"""Loudness of audio by ITU-R BS.1770. Legend: N audio samples, M blocks."""

import math

import numpy as np
from scipy.signal import lfilter

MIN_LOUDNESS_S = 0.4
"""One block of ITU-R BS.1770; the loudness of shorter audio is not defined."""
_STEP_S = 0.1
"""Distance of two blocks."""
_ABSOLUTE_GATE_LUFS, _RELATIVE_GATE_LU = -70.0, -10.0
_SHELF_HZ, _HIGH_PASS_HZ = 1681.974450955533, 38.13547087602444
Filter = tuple[list[float], list[float]]
"""Coefficients of a digital filter: numerator and denominator."""


def loudness_lufs(audio: np.ndarray, sample_rate_hz: int) -> float | None:
    """Return the loudness of mono audio [N] by ITU-R BS.1770.

    It is None below 0.4 s, below its gate of -70 LUFS, and at sample rates that K-weighting is not defined for.
    """
    size, step = round(MIN_LOUDNESS_S * sample_rate_hz), round(_STEP_S * sample_rate_hz)
    if len(audio) < size or sample_rate_hz <= 2 * _SHELF_HZ:
        return None
    weighted = audio.astype(np.float64)
    for numerator, denominator in k_weighting(sample_rate_hz):
        weighted = np.asarray(lfilter(numerator, denominator, weighted))
    powers = np.lib.stride_tricks.sliding_window_view(weighted**2, size)[::step].mean(axis=1)  # [M]
    powers = powers[powers > _power(_ABSOLUTE_GATE_LUFS)]
    if not len(powers):
        return None
    gate = _loudness(powers.mean()) + _RELATIVE_GATE_LU
    return _loudness(powers[powers > _power(gate)].mean())


def k_weighting(sample_rate_hz: int) -> tuple[Filter, Filter]:
    """Return the two filters of K-weighting, a high shelf and a high pass.

    The recommendation gives their coefficients for 48 kHz; for other rates, the bilinear transform of the same analog
    filters has their frequency response.
    """
    k, q = math.tan(math.pi * _SHELF_HZ / sample_rate_hz), 0.7071752369554196
    high = 10 ** (3.999843853973347 / 20)
    middle, scale = high**0.4996667741545416, 1 + k / q + k * k
    shelf = (
        [(high + middle * k / q + k * k) / scale, 2 * (k * k - high) / scale, (high - middle * k / q + k * k) / scale],
        [1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale],
    )
    k, q = math.tan(math.pi * _HIGH_PASS_HZ / sample_rate_hz), 0.5003270373238773
    scale = 1 + k / q + k * k
    return shelf, ([1.0, -2.0, 1.0], [1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale])


def _loudness(power: float) -> float:
    return -0.691 + 10 * math.log10(power)


def _power(loudness: float) -> float:
    return 10 ** ((loudness + 0.691) / 10)
