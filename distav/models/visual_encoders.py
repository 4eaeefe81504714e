"""Visual towers: frames to one feature vector per clip.

Legend: B clips, T frames, H W pixels, C channels, E feature width.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem

from distav.config.errors import UserError
from distav.config.model import VisualConfig
from distav.config.registry import Registry
from distav.config.schema import DataConfig
from distav.models.input_checks import check_frames
from distav.models.layers import GlobalBatchNorm, apply_blocks, with_global_batch_norm
from distav.models.vit import VIT_SIZES, TokenEncoder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRID_SIDE = 4
"""Height and width of the grid to which SmallConv pools a frame."""


class VisualEncoder(nn.Module):
    """Base class of the networks in `VISUAL_TOWERS`.

    A subclass creates its layers in a constructor with the same arguments, sets `feature_dim` there, and defines
    `forward(clip)`: normalized frames [B, 3, T, H, W] in, features [B, E] out. It takes its options from `config`, and
    the shape of the clips from `data`; with `activation_checkpointing`, it recomputes activations in the backward pass
    (`distav.models.layers.apply_blocks`).

    Attributes:
        feature_dim: width E of the features.
        supports_segments: whether clips may have fewer frames than `data.num_frames`. Event parsing needs this, since
            it encodes single segments.
    """

    supports_segments: ClassVar[bool] = False
    feature_dim: int

    def __init__(self, config: VisualConfig, data: DataConfig, activation_checkpointing: bool):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing


def _conv_stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, GlobalBatchNorm(out_channels), nn.ReLU(inplace=True))


class SmallConv(VisualEncoder):
    """Four 2-D convolutions per frame, pooling to a coarse grid, and one temporal convolution.

    For small clips on a CPU. Pooling to a grid keeps positions; global pooling would remove most of the information on
    shape in a small network.
    """

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig, activation_checkpointing: bool):
        super().__init__(config, data, activation_checkpointing)
        width = config.width
        self.feature_dim = 8 * width
        channels = (3, width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            _conv_stage(in_channels, out_channels, stride)
            for in_channels, out_channels, stride in zip(channels, channels[1:], (2, 2, 2, 1), strict=False)
        )
        self.project = nn.Linear(GRID_SIDE * GRID_SIDE * channels[-1], self.feature_dim)
        self.temporal = nn.Conv1d(self.feature_dim, self.feature_dim, 3, padding=1, groups=width)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        num_clips, _, num_frames = clip.shape[:3]
        x = apply_blocks(self.stages, clip.transpose(1, 2).flatten(0, 1), self.activation_checkpointing)
        x = self.project(adaptive_avg_pool2d(x, GRID_SIDE).flatten(1))
        x = x.view(num_clips, num_frames, -1).transpose(1, 2)
        return (x + self.temporal(x.relu())).mean(2)


class R2Plus1D18(VisualEncoder):
    """R(2+1)D-18 (Tran et al. 2018) from torchvision's blocks, with torchvision's parameter names."""

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig, activation_checkpointing: bool):
        super().__init__(config, data, activation_checkpointing)
        self.feature_dim = 512
        self.stem = with_global_batch_norm(R2Plus1dStem())
        self.layer1 = self._layer(64, 64, stride=1)
        self.layer2 = self._layer(64, 128, stride=2)
        self.layer3 = self._layer(128, 256, stride=2)
        self.layer4 = self._layer(256, 512, stride=2)

    @staticmethod
    def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        shortcut = None
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv3d(in_channels, out_channels, 1, stride, bias=False)
            shortcut = nn.Sequential(conv, nn.BatchNorm3d(out_channels))
        first = BasicBlock(in_channels, out_channels, Conv2Plus1D, stride, shortcut)
        layer = nn.Sequential(first, BasicBlock(out_channels, out_channels, Conv2Plus1D))
        with_global_batch_norm(layer)
        return layer

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        blocks = [self.stem, *self.layer1, *self.layer2, *self.layer3, *self.layer4]
        return apply_blocks(blocks, clip, self.activation_checkpointing).mean((2, 3, 4))


class TubeletViT(VisualEncoder):
    """A ViT over tubelets, patches that span several frames (Arnab et al. 2021)."""

    def __init__(self, config: VisualConfig, data: DataConfig, activation_checkpointing: bool):
        super().__init__(config, data, activation_checkpointing)
        for key, size, patch_key, patch in (
            ("data.frame_size", data.frame_size, "model.visual.patch", config.patch),
            ("data.num_frames", data.num_frames, "model.visual.tubelet", config.tubelet),
        ):
            if patch < 1 or size % patch:
                raise UserError(f"{patch_key}={patch} does not divide {key}={size}; change one of them.")
        tubelet = (config.tubelet, config.patch, config.patch)
        num_tokens = (data.num_frames // config.tubelet) * (data.frame_size // config.patch) ** 2
        self.encoder = TokenEncoder(config.name, num_tokens, activation_checkpointing)
        self.feature_dim = self.encoder.feature_dim
        self.embed = nn.Conv3d(3, self.feature_dim, tubelet, tubelet)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        return self.encoder(self.embed(clip).flatten(2).transpose(1, 2))


VISUAL_TOWERS: Registry[type[VisualEncoder]] = Registry(
    "model.visual.name",
    "distav.visual_towers",
    {"small_conv": SmallConv, "r2plus1d_18": R2Plus1D18, **dict.fromkeys(VIT_SIZES, TubeletViT)},
)
"""Networks that `model.visual.name` selects."""


class VisualTower(nn.Module):
    """Normalization of frames and the encoder that the configuration selects.

    Raises:
        UserError: for an unknown encoder, or one that does not support the shape of the clips.
    """

    lr_group = "towers"

    def __init__(self, config: VisualConfig, data: DataConfig, activation_checkpointing: bool):
        super().__init__()
        self.net = VISUAL_TOWERS.select(config.name)(config, data, activation_checkpointing)
        self.feature_dim = self.net.feature_dim
        self._shape = None if self.net.supports_segments else (data.num_frames, data.frame_size, data.frame_size)
        self._moments: dict[torch.device, Tensor] = {}

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [B, T, H, W, 3] uint8 to [B, E].

        Raises:
            ValueError: for frames of another type or shape.
        """
        check_frames(frames, self._shape)
        return self.net(self._normalize(frames, next(self.net.parameters()).dtype).permute(0, 4, 1, 2, 3))

    def _normalize(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """Subtract the mean and divide by the standard deviation of ImageNet's colors, computed in float32."""
        if frames.device not in self._moments:  # Not a buffer: a cast of the model to bfloat16 would round it.
            self._moments[frames.device] = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=frames.device)
        mean, std = self._moments[frames.device]
        if frames.is_cuda:  # One kernel reads uint8 and writes the result; a CPU would convert all frames first.
            return torch.addcmul(-mean / std, frames, 1 / (255 * std), out=torch.empty_like(frames, dtype=dtype))
        return frames.float().div_(255).sub_(mean).div_(std).to(dtype)
