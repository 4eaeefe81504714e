"""The trained network to take away: safetensors, its settings and a model card."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
from torch import Tensor

from distav.data.format import write_atomically
from distav.errors import UserError
from distav.models.av import AVModel
from distav.settings import AudioSettings, DataSettings, ModelSettings, VisualSettings

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
        "input": {
            "num_frames": data.num_frames,
            "frame_stride": data.frame_stride,
            "frame_size": data.frame_size,
            "audio_s": data.audio_s,
            "fps": run.data.train.fps,
            "sample_rate_hz": run.data.train.sample_rate_hz,
        },
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
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{folder} holds no export; expected model.safetensors and config.json, as in runs/NAME/export."
        )
    description = json.loads(path.read_text())
    chosen, inputs = description["model"], description["input"]
    settings = ModelSettings(
        **{**chosen, "visual": VisualSettings(**chosen["visual"]), "audio": AudioSettings(**chosen["audio"])}
    )
    data = DataSettings(num_frames=inputs["num_frames"], frame_size=inputs["frame_size"], audio_s=inputs["audio_s"])
    model = AVModel(settings, data, inputs["sample_rate_hz"], len(description["classes"]))
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval(), description


def _card(run: "Run", description: dict[str, Any], report: dict[str, Any]) -> str:
    data, inputs = run.data, description["input"]
    figures = json.dumps({key: report.get(key) for key in ("label_accuracy", "correspondence_auroc", "test")}, indent=1)
    return f"""# {run.settings.run.name}

Audio-visual encoders and classifiers trained by distav.

- Data: `{data.shards.root.name}`, {len(data.train)} training clips, {len(data.labels.classes)} classes.
- Towers: `{run.settings.model.visual.name}` for pictures, `{run.settings.model.audio.name}` for sound.
- Input: {inputs["num_frames"]} frames of {inputs["frame_size"]} x {inputs["frame_size"]} pixels, every
  {inputs["frame_stride"]} of {inputs["fps"]:g} a second, uint8; {inputs["audio_s"]:g} s of mono sound at
  {inputs["sample_rate_hz"]} Hz, float32 in -1..1.
- Phases: {", ".join(run.settings.phases)}.

Figures of the run:

```json
{figures}
```

Use: `model, description = distav.export.load_encoders("export")`; `model.visual(frames)`, `model.audio(sound)`.
"""
