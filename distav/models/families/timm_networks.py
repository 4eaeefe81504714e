"""Image networks of timm: `timm:NAME.TAG`, such as timm:vit_small_patch16_224.augreg_in1k.

Also `timm:hf-hub:REPOSITORY` and `timm:local-dir:DIRECTORY`. Legend: B clips, T frames, H W pixels, E feature width.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distav.config.errors import UserError, did_you_mean, format_list
from distav.config.model import VisualConfig
from distav.config.schema import DataConfig
from distav.models.encoder import IMAGENET_MEAN, IMAGENET_STD, VisualEncoder, VisualInput
from distav.models.families.frame_pooling import FramePooling, encode_frames
from distav.models.layers import with_global_batch_norm, without_dropout
from distav.models.weights import (
    interpolate_positions,
    missing_library,
    unavailable,
)

KEY = "model.visual.name"
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of names that are not in timm's own table."""


class TimmNetwork(VisualEncoder):
    """An image network of timm without its classifier, applied to every frame."""

    supports_segments = True

    def __init__(self, config: VisualConfig, data: DataConfig):
        super().__init__(config, data)
        self.check(config)
        self.check_input(config, data)
        description = config.architecture or self.describe(config)
        native = description["input_size"][-1]
        size = {"img_size": data.frame_size} if config.interpolate_positions and data.frame_size != native else {}
        net = _create(description["network"], **size)
        self.feature_dim = getattr(net, "head_hidden_size", None) or net.num_features
        self.network = without_dropout(with_global_batch_norm(net))
        self.has_fixed_frame_size = description["fixed_input_size"]
        self.supports_segments = config.frame_pooling != "transformer"
        self.pool = FramePooling(config.frame_pooling, self.feature_dim, data.num_frames)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode [B, 3, T, H, W] to [B, E]."""
        return self.pool(encode_frames(self.network, clip))

    @property
    def backbone(self) -> nn.Module:
        """The network without the pooling over frames."""
        return self.network

    @classmethod
    def check(cls, config: VisualConfig) -> None:
        """Check the name of the network, and that it selects weights or the settings do."""
        timm, name = _timm(config), _name(config)
        if config.architecture or name.startswith(_SOURCES):
            return
        base, _, tag = name.partition(".")
        if base not in timm.list_models():
            raise UserError(f"{KEY}={config.name}: no network of timm.{did_you_mean(base, timm.list_models())}")
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise UserError(
                f"{KEY}={config.name}: allowed: timm:{base}. with {format_list(tags)}.{did_you_mean(tag, tags)}"
            )
        if not tag and not config.weights:
            names = f"append . with {format_list(tags)}, or " if tags else ""
            raise UserError(
                f"{KEY}={config.name} selects no weights; {names}set model.visual.weights to a file, or to none for "
                "random weights."
            )

    @classmethod
    def describe(cls, config: VisualConfig) -> dict[str, Any]:
        """Return the name of the network, its input, and source and license of the weights."""
        cfg = _pretrained_cfg(_timm(config), _name(config))
        source = cfg.get("hf_hub_id") or cfg.get("url") or _name(config)
        return {
            "network": cfg["architecture"],
            "input_size": list(cfg.get("input_size") or (3, 224, 224)),
            "fixed_input_size": bool(cfg.get("fixed_input_size")),
            "mean": list(cfg.get("mean") or IMAGENET_MEAN),
            "std": list(cfg.get("std") or IMAGENET_STD),
            "source": config.weights or source,
            "license": "see the source" if config.weights else cfg.get("license") or "see the source",
        }

    @classmethod
    def input_format(cls, config: VisualConfig) -> VisualInput:
        """Return size and moments of the images that the network was trained with."""
        description = config.architecture or cls.describe(config)
        size = description["input_size"][-1]
        return VisualInput(frame_size=size, mean=description["mean"], std=description["std"])

    @classmethod
    def check_input(cls, config: VisualConfig, data: DataConfig) -> None:
        """Check the size of the frames against that of the network."""
        description = config.architecture or cls.describe(config)
        native = description["input_size"][-1]
        if description["fixed_input_size"] and data.frame_size != native and not config.interpolate_positions:
            raise UserError(
                f"data.frame_size={data.frame_size} contradicts {KEY}={config.name}, whose weights are for {native} "
                "pixels; remove data.frame_size or set model.visual.interpolate_positions=true."
            )

    def published_weights(self, config: VisualConfig) -> Mapping[str, Tensor]:
        """Return the weights of a tag, repository or directory."""
        return _download(config)

    def fit_positions(
        self, config: VisualConfig, weights: dict[str, Tensor], own: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the weights with position embeddings for the size of the frames."""
        positions = weights.get("pos_embed")
        if positions is not None and "pos_embed" in own and positions.shape != own["pos_embed"].shape:
            weights["pos_embed"] = _resized(positions, own["pos_embed"].shape[1], self.network)
        return weights


def _resized(positions: Tensor, length: int, net: Any) -> Tensor:
    special = 0 if getattr(net, "no_embed_class", False) else getattr(net, "num_prefix_tokens", 0)
    side = round((positions.shape[1] - special) ** 0.5)
    return interpolate_positions(positions, length, (side, side), net.patch_embed.grid_size, dim=1)


def _name(config: VisualConfig) -> str:
    return config.name.partition(":")[2]


def _timm(config: VisualConfig) -> Any:
    try:
        import timm
    except ImportError:
        raise missing_library(KEY, config.name, "timm") from None
    return timm


def _create(name: str, **options: Any) -> Any:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=0, **options)


@cache
def _pretrained_cfg(timm: Any, name: str) -> dict[str, Any]:
    """Return timm's description of a network: its own, or that of a repository or directory."""
    if not name.startswith(_SOURCES):
        cfg = timm.get_pretrained_cfg(name)
        return {**(cfg.to_dict() if cfg else {}), "architecture": name.partition(".")[0]}
    from timm.models import load_model_config_from_hf
    from timm.models._hub import load_model_config_from_path

    source, _, place = name.partition(":")
    if source == "local-dir":
        _check_directory(place, name)
    try:
        if source == "local-dir":
            cfg, architecture, _ = load_model_config_from_path(place)
        else:
            cfg, architecture, _ = load_model_config_from_hf(place)
    except Exception as error:  # The hub raises errors of several libraries.
        raise unavailable(KEY, f"timm:{name}", error, _advice(place)) from None
    return {**cfg, "architecture": architecture, "hf_hub_id": place}


def _check_directory(place: str, name: str) -> None:
    """Raise a UserError unless a directory holds the description of a network of timm."""
    file = Path(place).expanduser() / "config.json"
    reason = "no such directory" if not file.parent.is_dir() else "it has no config.json"
    if file.is_file():
        try:
            content = json.loads(file.read_text())
        except ValueError:
            return  # timm reports it.
        if "architecture" in content:
            return
        reason = "its config.json names no architecture of timm"
        reason += f"; a network of transformers is hf:{place}" if "model_type" in content else ""
    raise UserError(f"{KEY}=timm:{name}: {reason}; allowed: a directory as timm.models.save_for_hf() writes it.")


def _download(config: VisualConfig) -> dict[str, Tensor]:
    name = _name(config)
    try:
        net = _timm(config).create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # The hub raises errors of several libraries.
        cfg = _pretrained_cfg(_timm(config), name)
        raise unavailable(KEY, config.name, error, _advice(cfg.get("hf_hub_id") or cfg.get("url") or name)) from None
    return net.state_dict()


def _advice(source: str) -> str:
    return (
        f"Where there is a network, run: hf download {source}; the files are then in the cache of the hub, "
        "~/.cache/huggingface/hub, which can be copied (HF_HUB_OFFLINE=1 searches nothing else). Or download the "
        "weights, and set model.visual.weights to the file."
    )
