"""Export of a trained network: safetensors, its config and a model card."""

import dataclasses
import json
from typing import Any

import safetensors.torch
from torch import Tensor

from distav.config.model import ModelConfig
from distav.data.files import write_atomically
from distav.evaluation.fusion import Fusion
from distav.models import lora
from distav.models.export_files import EXPORT_FORMAT
from distav.training.model_card import model_card
from distav.training.run import Run


def export(run: Run, weights: dict[str, Tensor], report: dict[str, Any], fusion: Fusion | None = None) -> None:
    """Write `export/` in the run directory: weights, config.json to rebuild the network, and a model card.

    Args:
        run: the run.
        weights: full state dict of the network.
        report: the content of report.json; the card contains some of its figures.
        fusion: fusion of the classifiers; None: the joint classifier alone.
    """
    folder = run.folder / "export"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "model.safetensors", safetensors.torch.save(_merged_weights(weights, run.config.model)))
    description = _description(run, fusion)
    write_atomically(folder / "config.json", (json.dumps(description, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", model_card(run, description["input"], report).encode())


def _description(run: Run, fusion: Fusion | None) -> dict[str, Any]:
    split, data = run.data.train, run.config.data
    description = {
        "format": EXPORT_FORMAT,
        "model": dataclasses.asdict(_exported_model(run.config.model)),
        "segments": run.engine.model.segments,
        "classes": run.data.shards.classes,
        "fusion": None if fusion is None else dataclasses.asdict(fusion),
    }
    if split.streams:
        streams = {name: dataclasses.asdict(stream) for name, stream in split.streams.items()}
        return description | {"input": streams, "stored": None}
    inputs = {
        "num_frames": data.num_frames,
        "frame_stride": data.frame_stride,
        "frame_size": data.frame_size,
        "squash": data.squash,
        "audio_s": data.audio_s,
        "fps": split.fps,
        "sample_rate_hz": split.sample_rate_hz,
    }
    # Encoding of the training clips, with which new media can be converted to clips of the same form.
    duration_s = float(split.columns["duration_s"][0])
    stored = {"codec": split.codec, "short_side": split.sides[0] or data.frame_size, "clip_s": duration_s}
    return description | {"input": inputs, "stored": stored}


def _exported_model(model: ModelConfig) -> ModelConfig:
    """Return the settings of the network as exported: adapters are merged, and all weights are in the export."""
    exported = {"weights": "none", "freeze": 0, "unfreeze_after": 0, "lora_rank": 0}
    visual, audio = (dataclasses.replace(tower, **exported) for tower in (model.visual, model.audio))
    return dataclasses.replace(model, visual=visual, audio=audio, pretrained="")


def _merged_weights(weights: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Return the weights without adapters."""
    towers = {"visual": model.visual, "audio": model.audio}
    return lora.merged(weights, {name: tower.lora_alpha / max(1, tower.lora_rank) for name, tower in towers.items()})
