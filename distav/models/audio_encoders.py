"""Audio networks of distav.

Legend: B clips, N audio samples, F mel bins, L mel frames, E feature width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, max_pool2d

from distav.config.model import AudioConfig
from distav.models.encoder import AudioEncoder
from distav.models.layers import GlobalBatchNorm
from distav.models.vit import TokenEncoder

NUM_BANDS = 4
"""Frequency bands in which SmallConv pools over time."""


def _conv_layer(in_channels: int, out_channels: int, stride: int, kernel: int = 3) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, GlobalBatchNorm(out_channels), nn.ReLU(inplace=True)]


def _mean_of_bands(x: Tensor) -> Tensor:
    """Return the mean over time of each band: [B, C, F, L] to [B, C, bands, 1]."""
    return adaptive_avg_pool2d(x, (NUM_BANDS, 1))


def _max_of_bands(x: Tensor) -> Tensor:
    """Return the maximum over time of each band, as `adaptive_max_pool2d`, which ONNX cannot express."""
    rows = x.shape[2]
    edges = [(band * rows // NUM_BANDS, -(-(band + 1) * rows // NUM_BANDS)) for band in range(NUM_BANDS)]
    bands = [x[:, :, first:last] for first, last in edges]
    return torch.cat([max_pool2d(band, (band.shape[2], band.shape[3])) for band in bands], dim=2)


class SmallConv(AudioEncoder):
    """Four convolutions, then the mean and the maximum over time in a few bands, for short audio on a CPU."""

    supports_segments = True

    def __init__(self, config: AudioConfig, num_frames: int):
        super().__init__(config, num_frames)
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
        x = mel
        for stage in self.stages:
            x = stage(x)
        pooled = [pool(x).flatten(1) for pool in (_mean_of_bands, _max_of_bands)]
        return self.project(torch.cat(pooled, dim=1))


class AvidConv(AudioEncoder):
    """AVID's 2-D network: a wide convolution and four blocks of two (Morgado et al. 2021, audio encoder)."""

    supports_segments = True

    def __init__(self, config: AudioConfig, num_frames: int):
        super().__init__(config, num_frames)
        self.feature_dim = 512
        channels = (64, 64, 128, 256, 512)
        blocks = [nn.Sequential(*_conv_layer(1, 64, 2, kernel=7))]
        for in_channels, out_channels, stride in zip(channels, channels[1:], (2, 2, 2, 1), strict=False):
            first = _conv_layer(in_channels, out_channels, stride)
            blocks.append(nn.Sequential(*first, *_conv_layer(out_channels, out_channels, 1)))
        self.stages = nn.Sequential(*blocks)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L] to [B, E]."""
        return self.stages(mel).amax((2, 3))


class SpectrogramViT(AudioEncoder):
    """A ViT over patches of the spectrogram (Gong et al. 2021)."""

    def __init__(self, config: AudioConfig, num_frames: int):
        super().__init__(config, num_frames)
        self.patch = config.patch
        rows, columns = -(-config.num_mels // self.patch), -(-num_frames // self.patch)
        self.encoder = TokenEncoder(config.name, rows * columns)
        self.feature_dim = self.encoder.feature_dim
        self.embed = nn.Conv2d(1, self.feature_dim, self.patch, self.patch)

    def forward(self, mel: Tensor) -> Tensor:
        """Encode [B, 1, F, L], padded to a multiple of the patch size, to [B, E]."""
        pad_rows, pad_columns = -mel.shape[2] % self.patch, -mel.shape[3] % self.patch
        mel = nn.functional.pad(mel, (0, pad_columns, 0, pad_rows))
        return self.encoder(self.embed(mel).flatten(2).transpose(1, 2))

    def blocks(self) -> list[nn.Module]:
        """Return patch embedding and transformer blocks."""
        return [self.embed, *self.encoder.blocks, self.encoder.norm]
