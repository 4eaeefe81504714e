"""Image and video networks of transformers: CLIP, SigLIP, ViT, DINOv2, VideoMAE, TimeSformer, V-JEPA 2 and others.

Legend: B clips, T frames, H W pixels, E feature width.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.model import VisualConfig
from distav.config.schema import DataConfig
from distav.models.encoder import IMAGENET_MEAN, IMAGENET_STD, VisualEncoder, VisualInput
from distav.models.families import transformers_networks as networks
from distav.models.families import transformers_weights
from distav.models.families.frame_pooling import FramePooling, encode_frames
from distav.models.layers import with_global_batch_norm
from distav.models.weights import interpolate_positions

KEY = "model.visual.name"
VISUAL_INPUTS = ("pixel_values", "pixel_values_videos")
"""Names of images and videos among the arguments of networks."""
SIZE_KEYS, LENGTH_KEYS = ("image_size", "crop_size"), ("num_frames", "frames_per_clip")
ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Model types of transformers that adapt their positions to the size of the frames themselves."""
VIDEO_MAE_RATE_HZ = 7.5
"""Frames per second of the clips of VideoMAE: every fourth frame of a video with 30 (Tong et al. 2022, section 4)."""


class TransformersVisual(VisualEncoder):
    """The visual part of a network of transformers; image networks see one frame at a time."""

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__(config, data)
        description = config.architecture or self.describe(config)
        self.check_input(config, data)
        settings = description["network"]
        options: dict[str, Any] = {}
        if config.interpolate_positions:
            options = {key: data.frame_size for key in SIZE_KEYS if key in settings}
            options |= {key: data.num_frames for key in LENGTH_KEYS if key in settings}
        self.network: Any = with_global_batch_norm(networks.build(description, **options))
        self.argument = self.network.main_input_name
        self.has_fixed_frame_size = _has_fixed_size(settings)
        self.feature_dim = networks.feature_dim(settings, self.network)
        self.is_video = _is_video(settings)
        self.pool = None if self.is_video else FramePooling(config.frame_pooling, self.feature_dim, data.num_frames)
        self.supports_segments = not self.is_video and config.frame_pooling != "transformer"

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        if self.pool is None:
            return self._encode(clip.transpose(1, 2).contiguous())
        return self.pool(encode_frames(self._encode, clip))

    def _encode(self, pixels: Tensor) -> Tensor:
        return networks.pooled(self.network(**{self.argument: pixels}), self.network)

    @property
    def backbone(self) -> nn.Module:
        """The network without the pooling over frames."""
        return self.network

    @classmethod
    def check(cls, config: VisualConfig) -> None:
        """Check that transformers is installed; the network is looked up when the run is opened."""
        networks.import_transformers(KEY, config.name)

    @classmethod
    def describe(cls, config: VisualConfig) -> dict[str, Any]:
        """Return the settings of network and preprocessor, and the source of the weights."""
        description = networks.describe(config, "visual")
        networks.check_argument("visual", config.name, description, VISUAL_INPUTS)
        return description

    @classmethod
    def input_format(cls, config: VisualConfig) -> VisualInput:
        """Return the clips that the network was trained with."""
        description = config.architecture or cls.describe(config)
        settings, preprocessor = description["network"], description["preprocessor"]
        sizes = (_first(settings, SIZE_KEYS), _size_of(preprocessor))
        size = next(filter(None, sizes if _has_fixed_size(settings) else reversed(sizes)), 224)
        num_frames = _first(settings, LENGTH_KEYS) or preprocessor.get("num_frames") or VisualInput.num_frames
        rate = VIDEO_MAE_RATE_HZ if settings["model_type"] == "videomae" else 0.0
        mean, std = preprocessor.get("image_mean", IMAGENET_MEAN), preprocessor.get("image_std", IMAGENET_STD)
        return VisualInput(num_frames, size, rate, mean, std)

    @classmethod
    def check_input(cls, config: VisualConfig, data: DataConfig) -> None:
        """Check size and number of frames against those of the network."""
        description = config.architecture or cls.describe(config)
        settings, native = description["network"], cls.input_format(config)
        is_pe = settings["model_type"] == "pe_video_encoder"  # Its frames are encoded by a network of timm.
        for key, is_fixed, value, own in (
            ("data.frame_size", _has_fixed_size(settings), data.frame_size, native.frame_size),
            ("data.num_frames", _first(settings, LENGTH_KEYS) and _has_positions(settings), data.num_frames,
             native.num_frames),
        ):  # fmt: skip
            if is_fixed and value != own and (is_pe or not config.interpolate_positions):
                change = "" if is_pe else " or set model.visual.interpolate_positions=true"
                raise UserError(
                    f"{key}={value} contradicts {KEY}={config.name}, which takes {own}; remove {key}{change}."
                )
        tubelet = _listed(settings.get("tubelet_size", 1))
        patch = _listed(settings.get("patch_size", tubelet[-1]))[-1] if _has_positions(settings) else 1
        for key, value, part in (("frame_size", data.frame_size, patch), ("num_frames", data.num_frames, tubelet[0])):
            if value % part:
                raise UserError(f"data.{key}={value} contradicts {KEY}={config.name}; allowed: multiples of {part}.")

    def published_weights(self, config: VisualConfig) -> Mapping[str, Tensor]:
        """Return the weights of a repository or directory."""
        return transformers_weights.download(config, "visual", config.architecture or self.describe(config))

    def with_own_names(
        self, config: VisualConfig, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return weights by the names that the present version of transformers has for them."""
        return transformers_weights.with_own_names(config.architecture or self.describe(config), weights, own)

    def fit_positions(
        self, config: VisualConfig, weights: dict[str, Tensor], own: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the weights with position embeddings for the size of the frames."""
        for name, positions in weights.items():
            if "position" in name and name in own and positions.shape != own[name].shape:
                weights[name] = _resized(positions, own[name])
        return weights


def _resized(positions: Tensor, own: Tensor) -> Tensor:
    """Return embeddings of a square grid, after at most one special token, for the grid of another network."""
    dim = positions.dim() - 2
    old, new = positions.shape[dim], own.shape[dim]
    for special in (0, 1):
        sides = [math.isqrt(length - special) for length in (old, new)]
        if [side**2 + special for side in sides] == [old, new]:
            return interpolate_positions(positions, new, (sides[0],) * 2, (sides[1],) * 2, dim)
    return positions


def _has_positions(settings: dict[str, Any]) -> bool:
    """Return whether a network has embeddings of positions: transformers have, convolutional networks do not."""
    return "num_attention_heads" in settings


def _has_fixed_size(settings: dict[str, Any]) -> bool:
    """Return whether frames must have the size that the embeddings of positions are for."""
    return _has_positions(settings) and settings["model_type"] not in ANY_SIZE


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_video(settings: dict[str, Any]) -> bool:
    return _first(settings, LENGTH_KEYS) is not None or settings["model_type"].startswith("pe_video")


def _first(settings: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """Return the first setting that exists, such as the size of images; one number for both sides."""
    return next((_listed(settings[name])[-1] for name in names if settings.get(name)), None)


def _size_of(preprocessor: dict[str, Any]) -> int | None:
    size = preprocessor.get("crop_size") or preprocessor.get("size")
    return next(iter(size.values())) if isinstance(size, dict) else size
