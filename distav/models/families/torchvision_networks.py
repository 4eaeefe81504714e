"""Image and video networks of torchvision: `torchvision:NAME@WEIGHTS`, such as torchvision:r2plus1d_18@KINETICS400_V1.

Legend: B clips, T frames, H W pixels, E feature width.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distav.config.errors import UserError, did_you_mean, format_list
from distav.config.model import VisualConfig
from distav.config.schema import DataConfig
from distav.models.encoder import VisualEncoder, VisualInput
from distav.models.families.frame_pooling import FramePooling, encode_frames
from distav.models.layers import with_global_batch_norm, without_dropout
from distav.models.weights import interpolate_positions, unavailable

KEY = "model.visual.name"
FIXED_SIZE = ("vit_", "mvit_", "maxvit_")
"""Prefixes of networks with embeddings of positions, which other sizes and lengths have not."""


class TorchvisionNetwork(VisualEncoder):
    """A classification network of torchvision without its last layer."""

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__(config, data)
        self.check(config)
        self.check_input(config, data)
        name, _ = _parse(config)
        self.has_fixed_frame_size = name.startswith(FIXED_SIZE)
        resizes = name.startswith("vit_") and config.interpolate_positions
        torchvision = _torchvision()
        net = torchvision.models.get_model(name, weights=None, **({"image_size": data.frame_size} if resizes else {}))
        self.feature_dim = _remove_classifier(net)
        self.network = without_dropout(with_global_batch_norm(net))
        for module in net.modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0
        self.is_video = _is_video(name)
        self.supports_segments = not name.startswith(FIXED_SIZE) or (
            not self.is_video and config.frame_pooling != "transformer"
        )
        self.pool = None if self.is_video else FramePooling(config.frame_pooling, self.feature_dim, data.num_frames)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        return self.network(clip).flatten(1) if self.pool is None else self.pool(encode_frames(self.network, clip))

    @property
    def backbone(self) -> nn.Module:
        """The network without the pooling over frames."""
        return self.network

    @classmethod
    def check(cls, config: VisualConfig) -> None:
        """Check the name of the network and of its weights."""
        name, weights = _parse(config)
        models = _torchvision().models
        allowed = [*models.list_models(module=models), *models.list_models(module=models.video)]
        if name not in allowed:
            raise UserError(
                f"{KEY}={config.name}: allowed: torchvision:{format_list(allowed)}.{did_you_mean(name, allowed)}"
            )
        versions = [version.name for version in models.get_model_weights(name)]
        if weights and weights not in versions:
            raise UserError(
                f"{KEY}={config.name}: allowed: torchvision:{name}@ with {format_list(versions)}."
                f"{did_you_mean(weights, versions)}"
            )
        if not weights and not config.weights:
            raise UserError(
                f"{KEY}={config.name} selects no weights; append @ with {format_list(versions)}, or set "
                "model.visual.weights to a file, or to none for random weights."
            )

    @classmethod
    def input_format(cls, config: VisualConfig) -> VisualInput:
        """Return the clips that the weights were trained with."""
        name, _ = _parse(config)
        weights = _version(config)
        transforms: Any = weights.transforms()
        documentation = weights.meta.get("_docs", "")
        rate, length = (re.search(rf"{key}=([\d.]+)", documentation) for key in ("frame_rate", "clip_len"))
        if _is_video(name):
            num_frames = int(float(length.group(1).rstrip("."))) if length else 16
        else:
            num_frames = VisualInput.num_frames
        frame_rate_hz = float(rate.group(1).rstrip(".")) if rate else 0.0
        return VisualInput(num_frames, transforms.crop_size[0], frame_rate_hz, transforms.mean, transforms.std)

    @classmethod
    def check_input(cls, config: VisualConfig, data: DataConfig) -> None:
        """Check size and number of frames against what the network allows."""
        name, _ = _parse(config)
        meta, native = _version(config).meta, cls.input_format(config)
        smallest, shortest = meta["min_size"][0], meta.get("min_temporal_size", 1)
        fixed = name.startswith(FIXED_SIZE)
        if fixed and data.frame_size != native.frame_size:
            can_resize = name.startswith("vit_")
            if not (can_resize and config.interpolate_positions):
                change = " or set model.visual.interpolate_positions=true" if can_resize else ""
                raise UserError(
                    f"data.frame_size={data.frame_size} contradicts {KEY}={config.name}, whose weights are for "
                    f"{native.frame_size} pixels; remove data.frame_size{change}."
                )
        elif not fixed and data.frame_size < smallest:
            raise UserError(
                f"data.frame_size={data.frame_size} contradicts {KEY}={config.name}; allowed: {smallest} or more."
            )
        if name.startswith("mvit_") and data.num_frames != native.num_frames:
            raise UserError(
                f"data.num_frames={data.num_frames} contradicts {KEY}={config.name}, which takes {native.num_frames} "
                "frames; remove data.num_frames."
            )
        if _is_video(name) and data.num_frames < shortest:
            raise UserError(
                f"data.num_frames={data.num_frames} contradicts {KEY}={config.name}; allowed: {shortest} or more."
            )

    @classmethod
    def describe(cls, config: VisualConfig) -> dict[str, Any]:
        """Return source and license of the weights."""
        name, weights = _parse(config)
        if not weights or config.weights:
            return {"source": config.weights or "torchvision"}
        version = _version(config)
        return {"source": version.url, "license": version.meta.get("license", "see the source")}

    def published_weights(self, config: VisualConfig) -> Mapping[str, Tensor]:
        """Return the weights of a version."""
        return _download(config)

    def fit_positions(
        self, config: VisualConfig, weights: dict[str, Tensor], own: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the weights with position embeddings for the size of the frames."""
        name = "encoder.pos_embedding"
        if _parse(config)[0].startswith("vit_") and name in weights:
            length = own[name].shape[1]
            old, new = (round((size - 1) ** 0.5) for size in (weights[name].shape[1], length))
            if old != new:
                weights[name] = interpolate_positions(weights[name], length, (old, old), (new, new), dim=1)
        return weights


def _parse(config: VisualConfig) -> tuple[str, str]:
    """Return the names of the network and of its weights, which may be empty."""
    name, _, weights = config.name.partition(":")[2].partition("@")
    return name, weights


def _torchvision() -> Any:
    """Return the module `torchvision`, which takes seconds to import."""
    import torchvision

    return torchvision


def _is_video(name: str) -> bool:
    models = _torchvision().models
    return name in models.list_models(module=models.video)


def _version(config: VisualConfig) -> Any:
    """Return the version of the weights that the configuration names, or the default one of the network."""
    name, weights = _parse(config)
    versions = _torchvision().models.get_model_weights(name)
    return versions[weights] if weights else versions["DEFAULT"]


def _download(config: VisualConfig) -> dict[str, Tensor]:
    version = _version(config)
    file = Path(torch.hub.get_dir()) / "checkpoints" / version.url.rpartition("/")[2]
    try:
        return dict(version.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise unavailable(KEY, config.name, error, f"Download {version.url} and store it as {file}.") from None


def _remove_classifier(net: nn.Module) -> int:
    """Replace the last layer of a classification network by the identity; returns the width of its input."""
    layers = [
        (name, module) for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv3d | nn.Conv2d)
    ]
    name, layer = layers[-1]
    net.set_submodule(name, nn.Identity())
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
