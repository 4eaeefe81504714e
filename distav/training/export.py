"""Export of a trained network: safetensors, its config and a model card."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from distav.config.model import ModelConfig, TowerConfig
from distav.data.files import write_atomically
from distav.evaluation.fusion import Fusion
from distav.models import lora
from distav.models.export_files import EXPORT_FORMAT
from distav.training.run import Run

_CARD_FIGURES = ("label_accuracy", "correspondence_auroc", "test", "events")


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
    write_atomically(folder / "README.md", _model_card(run, description["input"], report).encode())


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


def _model_card(run: Run, inputs: dict[str, Any], report: dict[str, Any]) -> str:
    data = run.data
    figures = {name: report[name] for name in _CARD_FIGURES if name in report}
    if "test" in figures:  # Datasets may have hundreds of classes.
        figures["test"] = {name: value for name, value in figures["test"].items() if name != "by_class"}
    title, input_lines, usage = _parser_card(run) if data.train.streams else _encoder_card(run, inputs)
    return f"""# {run.config.run.name}

{title}

- Data: `{Path(data.shards.location).name}`, {len(data.train)} training clips, {len(data.shards.classes)} classes.
{input_lines}
- Noise: {_noise_estimates(report)}.
- Phases: {", ".join(run.config.phases)}.

Metrics:

```json
{json.dumps(figures, indent=1)}
```

Usage: `{usage}`.
"""


def _parser_card(run: Run) -> tuple[str, str, str]:
    streams = (f"`{name}` [{stream.steps}, {stream.dim}]" for name, stream in run.data.train.streams.items())
    return (
        "Audio-visual event parser over features, trained with distav.",
        f"- Input: {', '.join(streams)}, float32.",
        'model, description = distav.models.pretrained.load_parser("export")`; `model(seeds, **features)',
    )


def _encoder_card(run: Run, inputs: dict[str, Any]) -> tuple[str, str, str]:
    model = run.config.model
    input_lines = f"""- Towers: visual {_origin(model.visual)}, audio {_origin(model.audio)}.
- Input: {inputs["num_frames"]} frames of {inputs["frame_size"]} x {inputs["frame_size"]} pixels, uint8, every
  {inputs["frame_stride"]} frames at {inputs["fps"]:g} fps; {inputs["audio_s"]:g} s of mono audio at
  {inputs["sample_rate_hz"]} Hz, float32 in [-1, 1]."""
    return (
        "Audio-visual encoders and classifiers, trained with distav.",
        input_lines,
        'model, description = distav.load_encoders("export")`; `model.visual(frames)`, `model.audio(audio)',
    )


def _origin(tower: TowerConfig) -> str:
    """Return name, source and license of a tower, for the card."""
    source = tower.architecture.get("source")
    if not source or tower.weights == "none":
        return f"`{tower.name}`"
    return f"`{tower.name}` (initial weights: {source}, license: {tower.architecture.get('license', 'see the source')})"


def _noise_estimates(report: dict[str, Any]) -> str:
    """Return the noise rates of the last label correction, for the card."""
    if not report.get("corrections"):
        return "not estimated"
    last = report["corrections"][-1]
    estimates = []
    rates = {"label noise rate": "label_noise_rate", "pair mismatch rate": "pair_mismatch_rate"}
    if last.get("multi_label"):
        rates = {"missing label rate": "missing_label_rate", "wrong label rate": "wrong_label_rate"}
    for name, key in rates.items():
        rate = last[key]
        interval = f"95 % interval {rate['ci95_low']:.1%} to {rate['ci95_high']:.1%}"
        estimates.append(f"{name} {rate['estimate']:.1%} ({interval})")
    return ", ".join(estimates)
