"""Triangular filters on mel scales. Legend: K bins of a Fourier transform, F mel bins."""

import math

import numpy as np
import torch
from torch import Tensor


def mel_filters(
    scale: str,
    num_fft: int,
    num_mels: int,
    sample_rate_hz: int,
    min_hz: float,
    max_hz: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return triangular filters [K, F] float32, K = num_fft / 2 + 1, at equal distances on a mel scale.

    Scales: `htk` (2595 log10(1 + f / 700), O'Shaughnessy 1987), `kaldi` (the same, with filters that are triangles over
    mel instead of frequency), `slaney` (linear below 1 kHz, logarithmic above, filters of equal area; Slaney 1998).

    Args:
        scale: `htk`, `kaldi` or `slaney`.
        num_fft: samples of the Fourier transform.
        num_mels: F.
        sample_rate_hz: sample rate of the audio.
        min_hz, max_hz: lower edge of the first filter and upper edge of the last one.
        dtype: precision of the computation.
    """
    # In the constructor of a model under ZeRO-3, torch.arange and torch.tensor have the precision of training.
    bins = torch.linspace(0, sample_rate_hz / 2, num_fft // 2 + 1, dtype=dtype)
    low, high = _limit_in_mel(min_hz, scale), _limit_in_mel(max_hz, scale)
    edges = torch.linspace(low, high, num_mels + 2, dtype=dtype)
    bins, edges = (_to_mel(bins, scale), edges) if scale == "kaldi" else (bins, _to_hz(edges, scale))
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins[:, None] - left) / (center - left), (right - bins[:, None]) / (right - center)
    filters = torch.minimum(rising, falling).clamp(min=0)
    return (filters * (2 / (right - left)) if scale == "slaney" else filters).float()


def _limit_in_mel(hz: float, scale: str) -> float:
    """Return a frequency on the mel scale; a Python number, since torch.export cannot trace numbers from tensors."""
    if scale != "slaney":
        return 2595 * math.log10(1 + hz / 700)
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def mel_centers(scale: str, num_mels: int, min_hz: float, max_hz: float) -> np.ndarray:
    """Return the center frequencies of the filters of `mel_filters` in Hz: [F] float64."""
    edges = torch.linspace(
        _limit_in_mel(min_hz, scale), _limit_in_mel(max_hz, scale), num_mels + 2, dtype=torch.float64
    )
    return _to_hz(edges[1:-1], scale).numpy()


def _to_mel(hz: Tensor, scale: str) -> Tensor:
    slaney = torch.where(hz < 1000, hz * 3 / 200, 15 + 27 * torch.log(hz / 1000) / math.log(6.4))
    return slaney if scale == "slaney" else 2595 * torch.log10(1 + hz / 700)


def _to_hz(mel: Tensor, scale: str) -> Tensor:
    slaney = torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    return slaney if scale == "slaney" else 700 * (10 ** (mel / 2595) - 1)
