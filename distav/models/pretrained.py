"""Exported networks, loaded for use elsewhere: torch, torchvision, torchaudio and safetensors are all it takes."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.schema import AudioConfig, DataConfig, ModelConfig, ParserConfig, VisualConfig
from distav.data.modalities import FeatureStream
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser


def load_encoders(folder: str | Path) -> tuple[AVModel, dict[str, Any]]:
    """Load an exported network for use elsewhere, in evaluation mode.

    Args:
        folder: an `export/` folder.

    Returns:
        The model, whose towers are `.visual` (frames [B, T, H, W, 3] uint8) and `.audio` (sound [B, N] float32), and
        its description with the input that it expects and the names of its classes.

    Raises:
        UserError: where the folder holds no export.
    """
    description = _description(Path(folder))
    inputs = description["input"]
    if "num_frames" not in inputs:
        raise UserError(f"{folder} holds an event parser over features, and no encoders; load it by load_parser.")
    num_classes, segments = len(description["classes"]), description.get("segments", 0)
    model = AVModel(
        model_config(description), input_config(description), inputs["sample_rate_hz"], num_classes, segments
    )
    model.load_state_dict(load_weights(folder))
    return model.eval(), description


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return the weights of an `export/` folder by name.

    Raises:
        UserError: where it holds no export.
    """
    _description(Path(folder))
    path = Path(folder) / "model.safetensors"
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from None


def model_config(description: dict[str, Any]) -> ModelConfig:
    """Return the settings of an exported network's towers and heads."""
    chosen, parts = description["model"], {"visual": VisualConfig, "audio": AudioConfig, "parser": ParserConfig}
    # Exports of distav before it parsed events have no parser.
    return ModelConfig(**{**chosen, **{name: kind(**chosen.get(name, {})) for name, kind in parts.items()}})


def input_config(description: dict[str, Any]) -> DataConfig:
    """Return the settings by which clips are brought to what an exported network is fed."""
    names = ("num_frames", "frame_stride", "frame_size", "squash", "audio_s")
    return DataConfig(**{name: description["input"][name] for name in names if name in description["input"]})


def load_parser(folder: str | Path) -> tuple[FeatureParser, dict[str, Any]]:
    """Load an exported event parser over features for use elsewhere, in evaluation mode.

    Args:
        folder: an `export/` folder.

    Returns:
        The model, fed each stream [B, steps, dim] by name and `seeds` [B] int64, and its description with the streams
        that it expects and the names of its classes.

    Raises:
        UserError: where the folder holds no such export.
    """
    description = _description(Path(folder))
    if "num_frames" in description["input"]:
        raise UserError(f"{folder} holds encoders of clips; load them by load_encoders.")
    streams = {name: FeatureStream(**each) for name, each in description["input"].items()}
    settings = ParserConfig(**description["model"]["parser"])
    model = FeatureParser(settings, streams, description["segments"], len(description["classes"]))
    model.load_state_dict(load_weights(folder))
    return model.eval(), description


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} holds no export; expected model.safetensors and config.json, as in runs/NAME/export."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from None
