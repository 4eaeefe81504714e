"""Audio towers: waveform in, one feature vector a clip out; the log-mel front end is part of the tower.

Legend: B clips, N audio samples, F mel bins, L mel frames, E feature width.
"""

import torch
import torchaudio.functional as AF
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d

from distav.config.schema import AudioConfig, DataConfig
from distav.distributed.rng import uniform
from distav.models.layers import GlobalBatchNorm, run
from distav.models.vit import SIZES, TokenEncoder, unknown_tower

BANDS = 4
"""Bands of frequency that the small tower pools over time."""

MASK_STREAM = 1
"""Stream of a sample's random numbers that masks its spectrogram."""


def build_audio(settings: AudioConfig, data: DataConfig, sample_rate_hz: int, recompute: bool) -> "AudioTower":
    """Return the tower that the settings name, for sound of the length that the data settings name.

    Raises:
        UserError: for an unknown tower.
    """
    front = LogMel(settings, sample_rate_hz)
    if settings.name == "small_conv":
        return AudioTower(front, settings, SmallConv(settings.width, recompute))
    if settings.name == "avid_conv":
        return AudioTower(front, settings, AvidConv(recompute))
    if settings.name in SIZES:
        num_frames = front.num_frames(round(data.audio_s * sample_rate_hz))
        return AudioTower(front, settings, SpectrogramViT(settings, num_frames, recompute))
    raise unknown_tower("model.audio.name", settings.name, ("small_conv", "avid_conv"))


class LogMel(nn.Module):
    """Log-mel spectrogram with zero mean and unit variance in each clip, always computed in float32.

    Window and filter bank are made where they are needed and not kept as buffers, so that casting the model to
    bfloat16 leaves them alone.
    """

    def __init__(self, settings: AudioConfig, sample_rate_hz: int):
        super().__init__()
        self.sample_rate_hz, self.num_mels = sample_rate_hz, settings.num_mels
        self.window = max(2, round(settings.window_ms * sample_rate_hz / 1000))
        self.hop = max(1, round(settings.hop_ms * sample_rate_hz / 1000))
        self.num_fft = 1 << (self.window - 1).bit_length()
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def num_frames(self, num_samples: int) -> int:
        """Return the frames L of so many audio samples."""
        return 1 + num_samples // self.hop

    def forward(self, sound: Tensor) -> Tensor:
        """Turn sound [B, N] into [B, F, L] float32."""
        if sound.device not in self._tables:
            bins = self.num_fft // 2 + 1
            top = self.sample_rate_hz / 2
            banks = AF.melscale_fbanks(bins, 0.0, top, self.num_mels, self.sample_rate_hz)
            self._tables[sound.device] = torch.hann_window(self.window).to(sound.device), banks.to(sound.device)
        window, banks = self._tables[sound.device]
        power = AF.spectrogram(sound.float(), 0, window, self.num_fft, self.hop, self.window, 2.0, False)
        level = torch.log(torch.einsum("bfl,fm->bml", power, banks) + 1e-5)
        mean, std = level.mean((1, 2), keepdim=True), level.std((1, 2), keepdim=True)
        return (level - mean) / (std + 1e-3)


class AudioTower(nn.Module):
    """Front end, spectrogram masking in training, and encoder."""

    def __init__(self, front: LogMel, settings: AudioConfig, net: "SmallConv | AvidConv | SpectrogramViT"):
        super().__init__()
        self.front, self.net = front, net
        self.mask_mels, self.mask_time = settings.mask_mels, settings.mask_time
        self.feature_dim = net.feature_dim

    def forward(self, sound: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Encode sound [B, N] float32 in [-1, 1] to [B, E]; seeds [B] int64 draw the masks in training."""
        mel = self.front(sound)
        if self.training and seeds is not None:
            mel = self._masked(mel, seeds)
        return self.net(mel[:, None].to(next(self.net.parameters()).dtype))

    def _masked(self, mel: Tensor, seeds: Tensor) -> Tensor:
        """Blank one band and one stretch of each spectrogram (SpecAugment, Park et al. 2019)."""
        draws = uniform(seeds, MASK_STREAM, 4)
        for dim, share, first in ((1, self.mask_mels, 0), (2, self.mask_time, 2)):
            size = mel.shape[dim]
            length = draws[:, first] * share * size
            start = draws[:, first + 1] * (size - length)
            place = torch.arange(size, device=mel.device)
            blank = (place >= start[:, None]) & (place < (start + length)[:, None])
            mel = mel.masked_fill(blank[:, :, None] if dim == 1 else blank[:, None, :], 0.0)
        return mel


def _conv(inside: int, outside: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return [conv, GlobalBatchNorm(outside), nn.ReLU(inplace=True)]


class SmallConv(nn.Module):
    """Four convolutions, then the mean and the maximum over time in a few bands, for short sounds on a CPU."""

    def __init__(self, width: int, recompute: bool):
        super().__init__()
        self.feature_dim = 8 * width
        self.recompute = recompute
        widths = (1, width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(*_conv(inside, outside, 2)) for inside, outside in zip(widths, widths[1:], strict=False)
        )
        self.gather = nn.Linear(2 * BANDS * widths[-1], self.feature_dim)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L] to [B, E]."""
        x = run(self.stages, mel, self.recompute)
        pooled = [pool(x, (BANDS, 1)).flatten(1) for pool in (adaptive_avg_pool2d, adaptive_max_pool2d)]
        return self.gather(torch.cat(pooled, dim=1))


class AvidConv(nn.Module):
    """AVID's 2-D network: a wide convolution and four blocks of two (Morgado et al. 2021, audio encoder)."""

    def __init__(self, recompute: bool):
        super().__init__()
        self.feature_dim = 512
        self.recompute = recompute
        widths = (64, 64, 128, 256, 512)
        blocks = [nn.Sequential(*_conv(1, 64, 2, kernel=7))]
        for inside, outside, stride in zip(widths, widths[1:], (2, 2, 2, 1), strict=False):
            blocks.append(nn.Sequential(*_conv(inside, outside, stride), *_conv(outside, outside, 1)))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L] to [B, E]."""
        return run(self.blocks, mel, self.recompute).amax((2, 3))


class SpectrogramViT(nn.Module):
    """A ViT over patches of the spectrogram (Gong et al. 2021)."""

    def __init__(self, settings: AudioConfig, num_frames: int, recompute: bool):
        super().__init__()
        self.patch = settings.patch
        rows, columns = -(-settings.num_mels // self.patch), -(-num_frames // self.patch)
        self.encoder = TokenEncoder(settings.name, rows * columns, recompute)
        self.feature_dim = self.encoder.feature_dim
        self.embed = nn.Conv2d(1, self.feature_dim, self.patch, self.patch)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L] to [B, E]; the edges are filled up to whole patches."""
        spare = [-size % self.patch for size in mel.shape[2:]]
        mel = nn.functional.pad(mel, (0, spare[1], 0, spare[0]))
        return self.encoder(self.embed(mel).flatten(2).transpose(1, 2))
