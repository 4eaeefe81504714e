"""Loading of exported networks; requires only torch, torchvision and safetensors, and the library of the towers."""

import hashlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from distav.config.errors import UserError
from distav.config.model import AudioConfig, ModelConfig, ParserConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.data.modalities import FeatureStream
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser
from distav.models.export_files import WEIGHTS, corrupt_weights, read_description
from distav.models.hub import export_folder


def load_encoders(location: str | Path) -> tuple[AVModel, dict[str, Any]]:
    """Load exported encoders in evaluation mode.

    Args:
        location: an `export/` directory, or `hf://USER/NAME` or `hf://USER/NAME@REVISION` on the Hugging Face hub.

    Returns:
        The model, with the towers `.visual` (frames [B, T, H, W, 3] uint8 RGB -> features [B, E]) and `.audio` (mono
        audio [B, N] float32 in [-1, 1] -> [B, E]), and `.project_visual` and `.project_audio`, which map features to
        unit vectors [B, D] that are comparable between the modalities; and its description: `input` with `num_frames`
        T, `frame_size` H = W in pixels, `fps`, `audio_s` in seconds and `sample_rate_hz` in Hz, the names of the
        `classes`, and the weights with which `distav.evaluation.fusion.Fusion.from_description` combines the
        classifiers.

    Raises:
        UserError: if the directory holds no export of encoders in the current format, its weights are corrupt, a
            repository cannot be had, or the library of a tower is missing.

    Example:
        >>> model, description = distav.load_encoders("runs/quickstart/export")
        >>> features = model.visual(frames)
    """
    folder = export_folder(location)
    description = read_description(folder, location)
    inputs = description["input"]
    if "num_frames" not in inputs:
        raise UserError(f"{location} holds an event parser over features and no encoders; use load_parser.")
    num_classes, segments = len(description["classes"]), description["segments"]
    model = AVModel(
        model_config(description), input_config(description), inputs["sample_rate_hz"], num_classes, segments
    )
    model.load_state_dict(load_weights(folder))
    return model.eval(), description


def load_weights(location: str | Path) -> dict[str, Tensor]:
    """Return the weights of an export, in a directory or on the hub, by name.

    Raises:
        UserError: if it holds no export in the current format.
    """
    folder = export_folder(location)
    read_description(folder, location)
    try:
        return safetensors.torch.load_file(folder / WEIGHTS)
    except safetensors.SafetensorError as error:
        raise corrupt_weights(folder, error) from None


def weights_digest(location: str | Path) -> str:
    """Return the SHA-256 of the weights of an export, in a directory or on the hub.

    Raises:
        UserError: if it holds no export in the current format.
    """
    folder = export_folder(location)
    read_description(folder, location)
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_config(description: dict[str, Any]) -> ModelConfig:
    """Return the settings of the towers and heads of an exported network."""
    settings = description["model"]
    return ModelConfig(
        **{
            **settings,
            "visual": VisualConfig(**settings["visual"]),
            "audio": AudioConfig(**settings["audio"]),
            "parser": ParserConfig(**settings["parser"]),
        }
    )


def input_config(description: dict[str, Any]) -> DataConfig:
    """Return the data settings that convert clips to the input format of an exported network."""
    names = ("num_frames", "frame_stride", "frame_size", "squash", "audio_s")
    return DataConfig(**{name: description["input"][name] for name in names})


def load_parser(location: str | Path) -> tuple[FeatureParser, dict[str, Any]]:
    """Load an exported event parser over features in evaluation mode.

    Args:
        location: an `export/` directory, or `hf://USER/NAME` or `hf://USER/NAME@REVISION` on the Hugging Face hub.

    Returns:
        The model, which takes each stream [B, steps, dim] by name and `seeds` [B] int64, and its description, with the
        streams and the names of the classes.

    Raises:
        UserError: if the directory holds no export of an event parser in the current format.
    """
    folder = export_folder(location)
    description = read_description(folder, location)
    if "num_frames" in description["input"]:
        raise UserError(f"{location} holds encoders of clips; use load_encoders.")
    streams = {name: FeatureStream(**stream) for name, stream in description["input"].items()}
    config = ParserConfig(**description["model"]["parser"])
    model = FeatureParser(config, streams, description["segments"], len(description["classes"]))
    model.load_state_dict(load_weights(folder))
    return model.eval(), description
