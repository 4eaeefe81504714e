"""Loudness: the filters and reference signals of ITU-R BS.1770-4, and those of EBU Tech 3341 for its gates."""

import numpy as np
import pytest

from distav.tools.inspect_shards.loudness import k_weighting, loudness_lufs


def tone(level_dbfs: float, seconds: float, rate: int, frequency_hz: float = 997.0) -> np.ndarray:
    """Return a sine wave whose peak has this level."""
    time = np.arange(round(seconds * rate)) / rate
    return (10 ** (level_dbfs / 20) * np.sin(2 * np.pi * frequency_hz * time)).astype(np.float32)


def test_filters_at_48_khz_are_those_of_the_recommendation():
    shelf, high_pass = k_weighting(48000)
    np.testing.assert_allclose(shelf[0], [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-13)
    np.testing.assert_allclose(shelf[1], [1.0, -1.69065929318241, 0.73248077421585], atol=1e-13)
    np.testing.assert_allclose(high_pass[0], [1.0, -2.0, 1.0], atol=1e-13)
    np.testing.assert_allclose(high_pass[1], [1.0, -1.99004745483398, 0.99007225036621], atol=1e-13)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_a_tone_of_full_scale_has_its_loudness_at_every_rate(rate: int):
    assert loudness_lufs(tone(0, 2, rate), rate) == pytest.approx(-3.01, abs=0.05 if rate > 8000 else 0.1)
    assert loudness_lufs(tone(-20, 2, rate), rate) == pytest.approx(-23.01, abs=0.05 if rate > 8000 else 0.1)


def test_quiet_passages_are_gated():
    levels = [(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)]  # EBU Tech 3341, case 4, in one channel
    audio = np.concatenate([tone(level, seconds, 16000, 1000.0) for level, seconds in levels])
    assert loudness_lufs(audio, 16000) == pytest.approx(-26.01, abs=0.1)


def test_loudness_of_short_and_of_silent_audio_is_not_defined():
    assert loudness_lufs(tone(0, 0.39, 48000), 48000) is None
    assert loudness_lufs(tone(0, 0.41, 48000), 48000) is not None
    assert loudness_lufs(np.zeros(48000, np.float32), 48000) is None
    assert loudness_lufs(tone(-75, 2, 48000), 48000) is None
    assert loudness_lufs(tone(0, 2, 3000), 3000) is None  # Half of this rate is below the frequency of the shelf.
