"""Visual networks of distav.

Legend: B clips, T frames, H W pixels, C channels, E feature width.
"""

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from distav.config.errors import UserError
from distav.config.model import VisualConfig
from distav.config.schema import DataConfig
from distav.models.encoder import VisualEncoder
from distav.models.layers import GlobalBatchNorm, with_global_batch_norm
from distav.models.vit import TokenEncoder

GRID_SIDE = 4
"""Height and width of the grid to which SmallConv pools a frame."""


def _conv_stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, GlobalBatchNorm(out_channels), nn.ReLU(inplace=True))


class SmallConv(VisualEncoder):
    """Four 2-D convolutions per frame, pooling to a coarse grid, and one temporal convolution.

    For small clips on a CPU. Pooling to a grid keeps positions; global pooling would remove most of the information on
    shape in a small network.
    """

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__(config, data)
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
        x = clip.transpose(1, 2).flatten(0, 1)
        for stage in self.stages:
            x = stage(x)
        x = self.project(adaptive_avg_pool2d(x, GRID_SIDE).flatten(1))
        x = x.view(num_clips, num_frames, -1).transpose(1, 2)
        return (x + self.temporal(x.relu())).mean(2)


class R2Plus1D18(VisualEncoder):
    """R(2+1)D-18 (Tran et al. 2018) from torchvision's blocks, with torchvision's parameter names."""

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__(config, data)
        # Imported late, since importing torchvision takes seconds.
        from torchvision.models.video.resnet import R2Plus1dStem

        self.feature_dim = 512
        self.stem = with_global_batch_norm(R2Plus1dStem())
        self.layer1 = self._layer(64, 64, stride=1)
        self.layer2 = self._layer(64, 128, stride=2)
        self.layer3 = self._layer(128, 256, stride=2)
        self.layer4 = self._layer(256, 512, stride=2)

    @staticmethod
    def _layer(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D

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
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(clip)))))
        return x.mean((2, 3, 4))


class TubeletViT(VisualEncoder):
    """A ViT over tubelets, patches that span several frames (Arnab et al. 2021)."""

    @classmethod
    def check_input(cls, config: VisualConfig, data: DataConfig) -> None:
        """Check that patches divide the clips."""
        for key, size, patch_key, patch in (
            ("data.frame_size", data.frame_size, "model.visual.patch", config.patch),
            ("data.num_frames", data.num_frames, "model.visual.tubelet", config.tubelet),
        ):
            if patch < 1 or size % patch:
                raise UserError(f"{patch_key}={patch} does not divide {key}={size}; change one of them.")

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__(config, data)
        self.check_input(config, data)
        tubelet = (config.tubelet, config.patch, config.patch)
        num_tokens = (data.num_frames // config.tubelet) * (data.frame_size // config.patch) ** 2
        self.encoder = TokenEncoder(config.name, num_tokens)
        self.feature_dim = self.encoder.feature_dim
        self.embed = nn.Conv3d(3, self.feature_dim, tubelet, tubelet)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        return self.encoder(self.embed(clip).flatten(2).transpose(1, 2))

    def blocks(self) -> list[nn.Module]:
        """Return patch embedding and transformer blocks."""
        return [self.embed, *self.encoder.blocks, self.encoder.norm]
