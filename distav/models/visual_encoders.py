"""Visual towers: frames in, one feature vector a clip out.

Legend: B clips, T frames, H W pixels, C channels, E feature width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem

from distav.config.errors import UserError
from distav.config.schema import DataConfig, VisualConfig
from distav.models.layers import GlobalBatchNorm, run, with_global_batch_norm
from distav.models.vit import SIZES, TokenEncoder, unknown_tower

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


GRID = 4
"""Side of the grid that the small tower pools a frame to."""


def build_visual(settings: VisualConfig, data: DataConfig, recompute: bool) -> "VisualTower":
    """Return the tower that the settings name, for frames of the size that the data settings name.

    Raises:
        UserError: for an unknown tower, or patches that do not tile the clip.
    """
    if settings.name == "small_conv":
        return VisualTower(SmallConv(settings.width, recompute))
    if settings.name == "r2plus1d_18":
        return VisualTower(R2Plus1D18(recompute))
    if settings.name in SIZES:
        return VisualTower(TubeletViT(settings, data, recompute))
    raise unknown_tower("model.visual.name", settings.name, ("small_conv", "r2plus1d_18"))


class VisualTower(nn.Module):
    """Normalises frames and encodes them."""

    def __init__(self, net: "SmallConv | R2Plus1D18 | TubeletViT"):
        super().__init__()
        self.net = net
        self.feature_dim = net.feature_dim
        self._moments: dict[torch.device, Tensor] = {}

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames [B, T, H, W, 3] uint8 to [B, E]."""
        return self.net(self._normalized(frames, next(self.net.parameters()).dtype).permute(0, 4, 1, 2, 3))

    def _normalized(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """Subtract the mean and divide by the standard deviation of ImageNet's colors, computed in float32."""
        if frames.device not in self._moments:  # Not a buffer: a cast of the model to bfloat16 would round it.
            self._moments[frames.device] = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=frames.device)
        mean, std = self._moments[frames.device]
        if frames.is_cuda:  # One kernel reads uint8 and writes the result; a CPU would convert all frames first.
            return torch.addcmul(-mean / std, frames, 1 / (255 * std), out=torch.empty_like(frames, dtype=dtype))
        return frames.float().div_(255).sub_(mean).div_(std).to(dtype)


def _stage(inside: int, outside: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    return nn.Sequential(conv, GlobalBatchNorm(outside), nn.ReLU(inplace=True))


class SmallConv(nn.Module):
    """Four convolutions on each frame, a coarse grid of what is where, and one convolution across frames.

    For small clips on a CPU. The grid is kept since pooling it away costs a small network most of the shape.
    """

    def __init__(self, width: int, recompute: bool):
        super().__init__()
        self.feature_dim = 8 * width
        self.recompute = recompute
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            _stage(inside, outside, stride)
            for inside, outside, stride in zip(widths, widths[1:], (2, 2, 2, 1), strict=False)
        )
        self.gather = nn.Linear(GRID * GRID * widths[-1], self.feature_dim)
        self.across = nn.Conv1d(self.feature_dim, self.feature_dim, 3, padding=1, groups=width)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        num_clips, _, num_frames = clip.shape[:3]
        x = run(self.stages, clip.transpose(1, 2).flatten(0, 1), self.recompute)
        x = self.gather(adaptive_avg_pool2d(x, GRID).flatten(1))
        x = x.view(num_clips, num_frames, -1).transpose(1, 2)
        return (x + self.across(x.relu())).mean(2)


class R2Plus1D18(nn.Module):
    """R(2+1)D-18 (Tran et al. 2018) from torchvision's blocks, with its names for the weights."""

    def __init__(self, recompute: bool):
        super().__init__()
        self.feature_dim = 512
        self.recompute = recompute
        self.stem = with_global_batch_norm(R2Plus1dStem())
        widths = (64, 64, 128, 256, 512)
        for number, (inside, outside) in enumerate(zip(widths, widths[1:], strict=False), 1):
            setattr(self, f"layer{number}", self._layer(inside, outside, 1 if number == 1 else 2))

    @staticmethod
    def _layer(inside: int, outside: int, stride: int) -> nn.Module:
        shortcut = None
        if stride != 1 or inside != outside:
            conv = nn.Conv3d(inside, outside, 1, stride, bias=False)
            shortcut = nn.Sequential(conv, nn.BatchNorm3d(outside))
        first = BasicBlock(inside, outside, Conv2Plus1D, stride, shortcut)
        return with_global_batch_norm(nn.Sequential(first, BasicBlock(outside, outside, Conv2Plus1D)))

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        blocks = [block for number in range(1, 5) for block in getattr(self, f"layer{number}")]
        return run([self.stem, *blocks], clip, self.recompute).mean((2, 3, 4))


class TubeletViT(nn.Module):
    """A ViT over tubelets, patches that last some frames (Arnab et al. 2021)."""

    def __init__(self, settings: VisualConfig, data: DataConfig, recompute: bool):
        super().__init__()
        for key, size, part_key, part in (
            ("data.frame_size", data.frame_size, "model.visual.patch", settings.patch),
            ("data.num_frames", data.num_frames, "model.visual.tubelet", settings.tubelet),
        ):
            if part < 1 or size % part:
                raise UserError(f"{part_key}={part} does not divide {key}={size}; change one of them.")
        tubelet = (settings.tubelet, settings.patch, settings.patch)
        num_tokens = (data.num_frames // settings.tubelet) * (data.frame_size // settings.patch) ** 2
        self.encoder = TokenEncoder(settings.name, num_tokens, recompute)
        self.feature_dim = self.encoder.feature_dim
        self.embed = nn.Conv3d(3, self.feature_dim, tubelet, tubelet)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        return self.encoder(self.embed(clip).flatten(2).transpose(1, 2))
