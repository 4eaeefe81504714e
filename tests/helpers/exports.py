"""Exported networks with random weights, without a training."""

import dataclasses
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from distav.config.model import AudioConfig, ModelConfig, ParserConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.data.modalities import FeatureStream
from distav.models.av_model import AVModel
from distav.models.event_parser import FeatureParser
from distav.models.export_files import EXPORT_FORMAT
from distav.models.layers import GlobalBatchNorm
from distav.models.towers import AUDIO_TOWERS, VISUAL_TOWERS

CLASSES = ["bell", "dog", "drum", "rain", "train"]
DATA = DataConfig(num_frames=4, frame_stride=2, frame_size=32, audio_s=0.5)
RATE_HZ = 8000


def write_encoders(folder: Path, visual: str = "small_conv", audio: str = "small_conv") -> Path:
    """Write an export of encoders with towers of these names, and return its directory."""
    torch.manual_seed(0)
    towers = VisualConfig(visual, width=8), AudioConfig(audio, width=8, num_mels=40)
    for tower in towers:
        if ":" in tower.name:
            tower.weights = "none"
            table = VISUAL_TOWERS if tower is towers[0] else AUDIO_TOWERS
            tower.architecture = table.select(tower.name).describe(tower)
    config = ModelConfig(*towers, embed_dim=16, hidden_dim=32)
    model = AVModel(config, DATA, RATE_HZ, len(CLASSES))
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    inputs = {
        "num_frames": DATA.num_frames,
        "frame_stride": DATA.frame_stride,
        "frame_size": DATA.frame_size,
        "squash": DATA.squash,
        "audio_s": DATA.audio_s,
        "fps": 8.0,
        "sample_rate_hz": RATE_HZ,
    }
    stored = {"codec": "mjpeg", "short_side": DATA.frame_size, "clip_s": 1.0}
    return _write(folder, model, {"model": dataclasses.asdict(config), "input": inputs, "stored": stored})


def write_parser(folder: Path) -> Path:
    """Write an export of an event parser over features, and return its directory."""
    torch.manual_seed(0)
    streams = {"clip": FeatureStream("visual", 5, 12), "clap": FeatureStream("audio", 5, 8)}
    config = ModelConfig(parser=ParserConfig(width=16, heads=2, ffn_dim=32))
    model = FeatureParser(config.parser, streams, 5, len(CLASSES))
    inputs = {name: dataclasses.asdict(stream) for name, stream in streams.items()}
    return _write(folder, model, {"model": dataclasses.asdict(config), "input": inputs, "stored": None, "segments": 5})


def _write(folder: Path, model: torch.nn.Module, description: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    description = {"format": EXPORT_FORMAT, "segments": 0, "classes": CLASSES, "fusion": None} | description
    (folder / "config.json").write_text(json.dumps(description))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def example_clips(num_clips: int) -> tuple[Tensor, Tensor]:
    """Return frames [B, T, H, W, 3] uint8 and audio [B, N] float32 that the encoders of `write_encoders` take."""
    generator = torch.Generator().manual_seed(num_clips)
    shape = (num_clips, DATA.num_frames, DATA.frame_size, DATA.frame_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return frames, torch.randn(num_clips, round(DATA.audio_s * RATE_HZ), generator=generator) * 0.1
