"""The trained network to take away: safetensors, its settings and a model card."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from distav.data.files import write_atomically
from distav.models.pretrained import EXPORT_FORMAT
from distav.training.run import Run


def export(run: Run, state: dict[str, Tensor], report: dict[str, Any]) -> None:
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
        "format": EXPORT_FORMAT,
        "model": dataclasses.asdict(settings.model),
        "input": {name: dataclasses.asdict(each) for name, each in run.data.train.streams.items()}
        or {
            "num_frames": data.num_frames,
            "frame_stride": data.frame_stride,
            "frame_size": data.frame_size,
            "squash": data.squash,
            "audio_s": data.audio_s,
            "fps": run.data.train.fps,
            "sample_rate_hz": run.data.train.sample_rate_hz,
        },
        "stored": None if run.data.train.streams else _stored(run),
        "segments": run.engine.model.segments,
        "classes": run.data.shards.classes,
    }
    write_atomically(folder / "config.json", (json.dumps(description, indent=1) + "\n").encode())
    write_atomically(folder / "README.md", _card(run, description, report).encode())


def _stored(run: Run) -> dict[str, Any]:
    """Return how the clips were stored that the network learnt from, so that others can be brought into that form."""
    split = run.data.train
    duration_s = float(split.columns["duration_s"][0])
    return {"codec": split.codec, "short_side": split.sides[0], "clip_s": duration_s}


def _noise(report: dict[str, Any]) -> str:
    """Return what the last correction found of the noise, in words."""
    if not report.get("corrections"):
        return "not estimated"
    found = report["corrections"][-1]
    shares = ("{estimate:.1%} of the {what} ({ci95_low:.1%} to {ci95_high:.1%})".format(what=what, **found[key])
              for what, key in (("labels", "label_noise_rate"), ("pairs", "pair_mismatch_rate")))  # fmt: skip
    return f"estimated as {' and '.join(shares)} being wrong"


def _card(run: Run, description: dict[str, Any], report: dict[str, Any]) -> str:
    data, towers = run.data, run.settings.model
    told = ("label_accuracy", "correspondence_auroc", "test", "events")
    figures = json.dumps({key: report[key] for key in told if key in report}, indent=1)
    if data.train.streams:
        what = "The network that tells events heard and seen from features, trained by distav."
        streams = (f"`{name}` [{each.steps}, {each.dim}]" for name, each in data.train.streams.items())
        inputs = f"- Input: {', '.join(streams)}, float32."
        use = 'model, description = distav.models.pretrained.load_parser("export")`; `model(seeds, **features)'
    else:
        what = "Audio-visual encoders and classifiers trained by distav."
        fed = description["input"]
        inputs = f"""- Towers: `{towers.visual.name}` for pictures, `{towers.audio.name}` for sound.
- Input: {fed["num_frames"]} frames of {fed["frame_size"]} x {fed["frame_size"]} pixels, every
  {fed["frame_stride"]} of {fed["fps"]:g} a second, uint8; {fed["audio_s"]:g} s of mono sound at
  {fed["sample_rate_hz"]} Hz, float32 in -1..1."""
        use = 'model, description = distav.load_encoders("export")`; `model.visual(frames)`, `model.audio(sound)'
    return f"""# {run.settings.run.name}

{what}

- Data: `{Path(data.shards.location).name}`, {len(data.train)} training clips, {len(data.shards.classes)} classes.
{inputs}
- Noise of the data: {_noise(report)}.
- Phases: {", ".join(run.settings.phases)}.

Figures of the run:

```json
{figures}
```

Use: `{use}`.
"""
