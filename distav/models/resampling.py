"""Resampling of audio inside a network. Legend: B clips, N audio samples."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distav.models.audio_front_ends import AudioFrontEnd


def _sinc_filters(old: int, new: int) -> Tensor:
    """Return the filters [new, 1, 2 * width + old] float64 that interpolate `new` samples from `old` samples.

    Windowed sinc functions (Smith and Gossett 1984) with 6 zero crossings, a Hann window and a cutoff at 0.99 times the
    lower of the two Nyquist frequencies, the defaults of torchaudio.
    """
    rate = 0.99 * min(old, new)
    width = math.ceil(6 * old / rate)
    time = torch.linspace(-width, width + old - 1, 2 * width + old, dtype=torch.float64) / old
    phase = torch.linspace(0, new - 1, new, dtype=torch.float64)[:, None, None] / new
    x = ((time - phase) * rate).clamp(-6, 6)
    return torch.sinc(x) * torch.cos(x * (math.pi / 12)) ** 2 * (rate / old)


class Resample(AudioFrontEnd):
    """Resampling of audio [B, N] to another rate, as `torchaudio.functional.resample`; the identity for equal rates.

    torchaudio computes its filters in each call, which waits for the GPU and fails in a constructor under ZeRO-3.
    """

    def __init__(self, sample_rate_hz: int, new_rate_hz: int):
        divisor = math.gcd(sample_rate_hz, new_rate_hz)
        old, new = sample_rate_hz // divisor, new_rate_hz // divisor
        super().__init__(sample_rate_hz, partial(_sinc_filters, old, new))
        self.old, self.new = old, new

    def num_samples(self, num_samples: int) -> int:
        """Return the number of samples at the new rate for a number of samples at the old one."""
        return -(-num_samples * self.new // self.old)

    def _compute(self, audio: Tensor, filters: Tensor) -> Tensor:
        if self.old == self.new:
            return audio
        # A GPU computes convolutions of float32 in TF32.
        width, dtype = (filters.shape[2] - self.old) // 2, torch.float64 if audio.is_cuda else torch.float32
        padded = F.pad(audio.to(dtype), (width, width + self.old))[:, None]
        samples = F.conv1d(padded, filters.to(dtype), stride=self.old).transpose(1, 2).flatten(1)
        return samples[:, : self.num_samples(audio.shape[1])].float()
