"""The trained network to take away: safetensors, its settings and a model card."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from distav.data.format import Stream, write_atomically
from distav.errors import UserError
from distav.models.av import AVModel
from distav.models.parser import FeatureParser
from distav.settings import AudioSettings, DataSettings, ModelSettings, ParserSettings, VisualSettings

if TYPE_CHECKING:  # Loading encoders elsewhere takes no DALI and no DeepSpeed.
    from distav.run import Run


def export(run: "Run", state: dict[str, Tensor], report: dict[str, Any]) -> None:
    """Write `export/` of a run: weights, what is needed to build the network again, and a card.

    Args:
        run: the run.
        state: the whole state of the model.
        report: the figures for the card.
    """
    folder = run.folder / "export"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "model.safetensors", safetensors.torch.save(state))
    data, settings = run.settings.data, run.settings
    description = {
        "format": 1,
        "model": dataclasses.asdict(settings.model),
        "input": {name: dataclasses.asdict(each) for name, each in run.data.train.streams.items()}
        or {
            "num_frames": data.num_frames,
            "frame_stride": data.frame_stride,
            "frame_size": data.frame_size,
            "audio_s": data.audio_s,
            "fps": run.data.train.fps,
            "sample_rate_hz": run.data.train.sample_rate_hz,
        },
        "segments": run.engine.model.segments,
        "classes": run.data.shards.classes,
    }
    write_atomically(folder / "config.json", (json.dumps(description, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", _card(run, description, report).encode())


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
    chosen, inputs = description["model"], description["input"]
    if "num_frames" not in inputs:
        raise UserError(f"{folder} holds an event parser over features, and no encoders; load it by load_parser.")
    parts = {"visual": VisualSettings, "audio": AudioSettings, "parser": ParserSettings}
    # Exports of distav before it parsed events have no parser.
    settings = ModelSettings(**{**chosen, **{name: kind(**chosen.get(name, {})) for name, kind in parts.items()}})
    data = DataSettings(num_frames=inputs["num_frames"], frame_size=inputs["frame_size"], audio_s=inputs["audio_s"])
    num_classes, segments = len(description["classes"]), description.get("segments", 0)
    model = AVModel(settings, data, inputs["sample_rate_hz"], num_classes, segments)
    model.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"))
    return model.eval(), description


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
    streams = {name: Stream(**each) for name, each in description["input"].items()}
    settings = ParserSettings(**description["model"]["parser"])
    model = FeatureParser(settings, streams, description["segments"], len(description["classes"]))
    model.load_state_dict(safetensors.torch.load_file(Path(folder) / "model.safetensors"))
    return model.eval(), description


def _description(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} holds no export; expected model.safetensors and config.json, as in runs/NAME/export."
        )
    return json.loads(path.read_text())


def _card(run: "Run", description: dict[str, Any], report: dict[str, Any]) -> str:
    data, towers = run.data, run.settings.model
    told = ("label_accuracy", "correspondence_auroc", "test", "events")
    figures = json.dumps({key: report[key] for key in told if key in report}, indent=1)
    if data.train.streams:
        what = "The network that tells events heard and seen from features, trained by distav."
        streams = (f"`{name}` [{each.steps}, {each.dim}]" for name, each in data.train.streams.items())
        inputs = f"- Input: {', '.join(streams)}, float32."
        use = 'model, description = distav.export.load_parser("export")`; `model(seeds, **features)'
    else:
        what = "Audio-visual encoders and classifiers trained by distav."
        fed = description["input"]
        inputs = f"""- Towers: `{towers.visual.name}` for pictures, `{towers.audio.name}` for sound.
- Input: {fed["num_frames"]} frames of {fed["frame_size"]} x {fed["frame_size"]} pixels, every
  {fed["frame_stride"]} of {fed["fps"]:g} a second, uint8; {fed["audio_s"]:g} s of mono sound at
  {fed["sample_rate_hz"]} Hz, float32 in -1..1."""
        use = 'model, description = distav.export.load_encoders("export")`; `model.visual(frames)`, `model.audio(sound)'
    return f"""# {run.settings.run.name}

{what}

- Data: `{Path(data.shards.where).name}`, {len(data.train)} training clips, {len(data.shards.classes)} classes.
{inputs}
- Phases: {", ".join(run.settings.phases)}.

Figures of the run:

```json
{figures}
```

Use: `{use}`.
"""
