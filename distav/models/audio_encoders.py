"""Audio towers: waveform to one feature vector per clip. The log-mel front end is part of the tower.

Legend: B clips, N audio samples, F mel bins, L mel frames, E feature width.
"""

from typing import ClassVar

import torch
import torchaudio.functional as AF
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from distav.config.model import AudioConfig
from distav.config.registry import Registry
from distav.config.schema import DataConfig
from distav.distributed.rng import uniform
from distav.models.input_checks import check_audio, check_seeds
from distav.models.layers import GlobalBatchNorm, apply_blocks
from distav.models.vit import VIT_SIZES, TokenEncoder

NUM_BANDS = 4
"""Frequency bands in which SmallConv pools over time."""

MASK_STREAM = 1
"""Stream of a sample's random numbers for its spectrogram masks."""


class LogMel(nn.Module):
    """Log-mel spectrogram with zero mean and unit variance per clip, always computed in float32.

    Window and filter bank are cached per device and are not buffers, so that a cast of the model to bfloat16 does not
    affect them.
    """

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

    def forward(self, audio: Tensor) -> Tensor:
        """Compute the spectrogram [B, F, L] float32 of audio [B, N]."""
        if audio.device not in self._tables:
            num_bins = self.num_fft // 2 + 1
            banks = AF.melscale_fbanks(num_bins, 0.0, self.sample_rate_hz / 2, self.num_mels, self.sample_rate_hz)
            self._tables[audio.device] = torch.hann_window(self.window).to(audio.device), banks.to(audio.device)
        window, banks = self._tables[audio.device]
        power = AF.spectrogram(audio.float(), 0, window, self.num_fft, self.hop, self.window, 2.0, False)
        level = torch.log(torch.einsum("bfl,fm->bml", power, banks) + 1e-5)
        mean, std = level.mean((1, 2), keepdim=True), level.std((1, 2), keepdim=True)
        return (level - mean) / (std + 1e-3)


class AudioEncoder(nn.Module):
    """Base class of the networks in `AUDIO_TOWERS`.

    A subclass creates its layers in a constructor with the same arguments, sets `feature_dim` there, and defines
    `forward(mel)`: log-mel spectrograms [B, 1, F, L] in, features [B, E] out. It takes its options from `config`; with
    `activation_checkpointing`, it recomputes activations in the backward pass (`distav.models.layers.apply_blocks`).

    Attributes:
        feature_dim: width E of the features.
        supports_segments: whether spectrograms may have fewer than `num_frames` frames. Event parsing needs this, since
            it encodes single segments.
    """

    supports_segments: ClassVar[bool] = False
    feature_dim: int

    def __init__(self, config: AudioConfig, num_frames: int, activation_checkpointing: bool):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing


def _conv_layer(in_channels: int, out_channels: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, GlobalBatchNorm(out_channels), nn.ReLU(inplace=True)]


class SmallConv(AudioEncoder):
    """Four convolutions, then the mean and the maximum over time in a few bands, for short audio on a CPU."""

    supports_segments = True

    def __init__(self, config: AudioConfig, num_frames: int, activation_checkpointing: bool):
        super().__init__(config, num_frames, activation_checkpointing)
        width = config.width
        self.feature_dim = 8 * width
        channels = (1, width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(*_conv_layer(in_channels, out_channels, 2))
            for in_channels, out_channels in zip(channels, channels[1:], strict=False)
        )
        self.project = nn.Linear(2 * NUM_BANDS * channels[-1], self.feature_dim)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L] to [B, E]."""
        x = apply_blocks(self.stages, mel, self.activation_checkpointing)
        pooled = [pool(x, (NUM_BANDS, 1)).flatten(1) for pool in (adaptive_avg_pool2d, adaptive_max_pool2d)]
        return self.project(torch.cat(pooled, dim=1))


class AvidConv(AudioEncoder):
    """AVID's 2-D network: a wide convolution and four blocks of two (Morgado et al. 2021, audio encoder)."""

    supports_segments = True

    def __init__(self, config: AudioConfig, num_frames: int, activation_checkpointing: bool):
        super().__init__(config, num_frames, activation_checkpointing)
        self.feature_dim = 512
        channels = (64, 64, 128, 256, 512)
        blocks = [nn.Sequential(*_conv_layer(1, 64, 2, kernel=7))]
        for in_channels, out_channels, stride in zip(channels, channels[1:], (2, 2, 2, 1), strict=False):
            first = _conv_layer(in_channels, out_channels, stride)
            blocks.append(nn.Sequential(*first, *_conv_layer(out_channels, out_channels, 1)))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L] to [B, E]."""
        return apply_blocks(self.blocks, mel, self.activation_checkpointing).amax((2, 3))


class SpectrogramViT(AudioEncoder):
    """A ViT over patches of the spectrogram (Gong et al. 2021)."""

    def __init__(self, config: AudioConfig, num_frames: int, activation_checkpointing: bool):
        super().__init__(config, num_frames, activation_checkpointing)
        self.patch = config.patch
        rows, columns = -(-config.num_mels // self.patch), -(-num_frames // self.patch)
        self.encoder = TokenEncoder(config.name, rows * columns, activation_checkpointing)
        self.feature_dim = self.encoder.feature_dim
        self.embed = nn.Conv2d(1, self.feature_dim, self.patch, self.patch)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L], padded to a multiple of the patch size, to [B, E]."""
        pad_rows, pad_columns = -mel.shape[2] % self.patch, -mel.shape[3] % self.patch
        mel = nn.functional.pad(mel, (0, pad_columns, 0, pad_rows))
        return self.encoder(self.embed(mel).flatten(2).transpose(1, 2))


AUDIO_TOWERS: Registry[type[AudioEncoder]] = Registry(
    "model.audio.name",
    "distav.audio_towers",
    {"small_conv": SmallConv, "avid_conv": AvidConv, **dict.fromkeys(VIT_SIZES, SpectrogramViT)},
)
"""Networks that `model.audio.name` selects."""


class AudioTower(nn.Module):
    """Log-mel front end, spectrogram masking in training, and the encoder that the configuration selects.

    Raises:
        UserError: for an unknown encoder.
    """

    lr_group = "towers"

    def __init__(self, config: AudioConfig, data: DataConfig, sample_rate_hz: int, activation_checkpointing: bool):
        super().__init__()
        self.front_end = LogMel(config, sample_rate_hz)
        num_samples = round(data.audio_s * sample_rate_hz)
        num_frames = self.front_end.num_frames(num_samples)
        self.net = AUDIO_TOWERS.select(config.name)(config, num_frames, activation_checkpointing)
        self._num_samples = None if self.net.supports_segments else num_samples
        self.mask_mels, self.mask_time = config.mask_mels, config.mask_time
        self.feature_dim = self.net.feature_dim

    def forward(self, audio: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Encode audio [B, N] float32 in [-1, 1] to [B, E]; `seeds` [B] int64 are those of the masks in training.

        Raises:
            ValueError: for audio or seeds of another type or shape.
        """
        check_audio(audio, self.front_end.min_samples, self._num_samples)
        if seeds is not None:
            check_seeds(seeds, len(audio))
        mel = self.front_end(audio)
        if self.training and seeds is not None:
            mel = self._mask(mel, seeds)
        return self.net(mel[:, None].to(next(self.net.parameters()).dtype))

    def _mask(self, mel: Tensor, seeds: Tensor) -> Tensor:
        """Mask one frequency band and one time interval of each spectrogram (SpecAugment, Park et al. 2019)."""
        draws = uniform(seeds, MASK_STREAM, 4)
        for dim, fraction, first in ((1, self.mask_mels, 0), (2, self.mask_time, 2)):
            size = mel.shape[dim]
            length = draws[:, first] * fraction * size
            start = draws[:, first + 1] * (size - length)
            position = torch.arange(size, device=mel.device)
            masked = (position >= start[:, None]) & (position < (start + length)[:, None])
            mel = mel.masked_fill(masked[:, :, None] if dim == 1 else masked[:, None, :], 0.0)
        return mel
