"""Front ends of audio networks: what computes their input from audio, and distav's own, a log-mel spectrogram.

Legend: B clips, N audio samples, F mel bins, L spectrogram frames.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from distav.config.model import AudioConfig
from distav.models.mel import mel_centers, mel_filters


class FrontEnd(nn.Module, ABC):
    """Base class of front ends: modules without parameters that take audio [B, N].

    Attributes:
        min_samples: number of audio samples below which there is no output.
        mel_dim, time_dim: dimensions of mel bins and time in the output; None if it has none.
    """

    min_samples: int = 1
    mel_dim: int | None = None
    time_dim: int | None = None

    @abstractmethod
    def num_frames(self, num_samples: int) -> int:
        """Return the size of the time dimension of the output for a number N of audio samples."""

    def mel_centers_hz(self) -> np.ndarray | None:
        """Return the center frequencies of the mel bins in Hz, [F] ascending; None if the output has none."""
        return None

    def frame_distance_s(self) -> float | None:
        """Return the distance of two spectrogram frames in seconds; None if the output has none."""
        return None


class LogMel(FrontEnd):
    """Log-mel spectrogram with zero mean and unit variance per clip, always computed in float32.

    Powers and mel filters (HTK's scale) are those of `torchaudio.transforms.MelSpectrogram` with its defaults. Window
    and filters are cached per device and are not buffers, so that a cast of the model to bfloat16 does not affect them.
    """

    mel_dim, time_dim = 2, 3

    def __init__(self, config: AudioConfig, sample_rate_hz: int):
        super().__init__()
        self.sample_rate_hz, self.num_mels = sample_rate_hz, config.num_mels
        self.window = max(2, round(config.window_ms * sample_rate_hz / 1000))
        self.hop = max(1, round(config.hop_ms * sample_rate_hz / 1000))
        self.num_fft = 1 << (self.window - 1).bit_length()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def min_samples(self) -> int:
        """Number of audio samples below which there is no spectrogram: half a window is mirrored at both ends."""
        return self.num_fft // 2 + 1

    def num_frames(self, num_samples: int) -> int:
        """Return the number L of spectrogram frames for a number of audio samples."""
        return 1 + num_samples // self.hop

    def mel_centers_hz(self) -> np.ndarray:
        """Return the center frequencies of the mel bins in Hz: [F]."""
        return mel_centers("htk", self.num_mels, 0.0, self.sample_rate_hz / 2)

    def frame_distance_s(self) -> float:
        """Return the distance of two spectrogram frames in seconds."""
        return self.hop / self.sample_rate_hz

    def forward(self, audio: Tensor) -> Tensor:
        """Compute the spectrogram [B, 1, F, L] float32 of audio [B, N]."""
        window, filters = self._tables.get(audio.device) or self._create_tables(audio.device)
        spectrum = torch.stft(audio.float(), self.num_fft, self.hop, self.window, window, return_complex=True)
        level = torch.log(torch.einsum("bfl,fm->bml", spectrum.abs().square(), filters) + 1e-5)
        mean, std = level.mean((1, 2), keepdim=True), level.std((1, 2), keepdim=True)
        return ((level - mean) / (std + 1e-3))[:, None]

    def _create_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return window and filters [K, F] on a device, and keep them."""
        rate = self.sample_rate_hz
        filters = mel_filters("htk", self.num_fft, self.num_mels, rate, 0.0, rate / 2, torch.float32)
        tables = torch.hann_window(self.window).to(device), filters.to(device)
        if not torch.compiler.is_exporting():  # Tensors of a trace have no values outside of it.
            self._tables[device] = tables
        return tables
