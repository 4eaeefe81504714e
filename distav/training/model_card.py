"""The model card of an export: front matter of the Hugging Face hub, data, noise estimates, metrics and usage."""

import json
import re
from pathlib import Path
from typing import Any

from distav.config.errors import format_list
from distav.config.model import TowerConfig
from distav.models.export_files import EXAMPLE_LOCATION, LICENSE_NOTE, UNKNOWN_LICENSE
from distav.models.hub import SCHEME
from distav.noise.noise_rate import MAX_INTERVAL_WIDTH
from distav.training.run import Run

_FIGURES = {
    "test": "scores on the test split",
    "events": "event parsing on the test split",
    "label_accuracy": "accuracy of given and corrected training labels, by the true labels of the dataset",
    "correspondence_auroc": "AUROC of the correspondence probability for mismatched training pairs",
}
"""Entries of report.json in the card, and what they are."""
_HUB_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def model_card(run: Run, inputs: dict[str, Any], report: dict[str, Any]) -> str:
    """Return the model card in Markdown.

    Args:
        run: the finished run.
        inputs: input format in the description of the export.
        report: the content of report.json.
    """
    data = run.data
    title, input_lines, usage = _parser_parts(run) if data.train.streams else _encoder_parts(run, inputs)
    name = Path(data.shards.location).name
    return f"""{_front_matter(run)}
# {run.config.run.name}

{title}

- Data: `{name}`, {len(data.train)} training clips, {len(data.shards.classes)} classes:
  {format_list(data.shards.classes)}.
{input_lines}
- Noise in the training data: {_noise_estimates(run, report)}.
- Phases: {", ".join(run.config.phases)}.
- License: {LICENSE_NOTE}. The licenses of data and initial weights may restrict it.

## Usage

```python
{usage}
```

Loading needs torch, torchvision and safetensors, and for towers of timm or transformers their library; a
name on the hub also needs huggingface_hub.

## Metrics

{_metrics(run, report)}"""


def _front_matter(run: Run) -> str:
    parses = bool(run.data.train.streams)
    lines = [UNKNOWN_LICENSE, "library_name: distav"]
    if not parses:
        lines.append("pipeline_tag: feature-extraction")
    topics = ["audio-visual-event-parsing"] if parses else ["video", "audio", "representation-learning"]
    lines += ["tags:", *(f"- {tag}" for tag in ("distav", "audio-visual", *topics, "noisy-labels"))]
    if repositories := _base_repositories(run):
        lines += ["base_model:", *(f"- {json.dumps(name)}" for name in repositories)]
    return "\n".join(["---", *lines, "---", ""])


def _base_repositories(run: Run) -> list[str]:
    """Return the repositories of the hub with initial weights."""
    model, found = run.config.model, list[str]()
    if not run.data.train.streams:
        for tower in (model.visual, model.audio):
            source = str(tower.architecture.get("source", ""))
            is_published = tower.name.startswith(("hf:", "timm:")) and not tower.weights
            if is_published and _HUB_REPOSITORY.fullmatch(source) and not Path(source).exists():
                found.append(source)
    if model.pretrained.startswith(SCHEME):
        found.append(model.pretrained.removeprefix(SCHEME).partition("@")[0])
    return list(dict.fromkeys(found))


def _parser_parts(run: Run) -> tuple[str, str, str]:
    """Return title, description of the input, and usage example of an event parser."""
    streams = (f"`{name}` [B, {stream.steps}, {stream.dim}]" for name, stream in run.data.train.streams.items())
    usage = f"""import torch

from distav.models.pretrained import load_parser

model, description = load_parser({EXAMPLE_LOCATION}
streams = {{name: torch.zeros(1, stream["steps"], stream["dim"]) for name, stream in description["input"].items()}}
seeds = torch.zeros(1, dtype=torch.int64)
with torch.no_grad():
    parsed = model(seeds, **streams)
segments = parsed["segments"].sigmoid()  # [1, 2, segments, classes]: audio, visual"""
    return (
        "Audio-visual event parser over features, trained with distav.",
        f"- Input: {', '.join(streams)}, float32.{_initial_export(run)}",
        usage,
    )


def _encoder_parts(run: Run, inputs: dict[str, Any]) -> tuple[str, str, str]:
    """Return title, description of the input, and usage example of encoders."""
    model = run.config.model
    frames, side, rate = inputs["num_frames"], inputs["frame_size"], inputs["sample_rate_hz"]
    samples, stride = round(inputs["audio_s"] * rate), inputs["frame_stride"]
    spacing = "all frames" if stride == 1 else f"one in {stride} frames"
    input_lines = f"""- Towers: visual {_origin(model.visual)}, audio {_origin(model.audio)}.{_initial_export(run)}
- Input: frames [B, {frames}, {side}, {side}, 3] uint8, RGB, {spacing} at {inputs["fps"]:g} fps;
  mono audio [B, {samples}] float32 in [-1, 1], {inputs["audio_s"]:g} s at {rate} Hz. The towers normalize both."""
    usage = f"""import distav
import torch

model, description = distav.load_encoders({EXAMPLE_LOCATION}
frames = torch.zeros(1, {frames}, {side}, {side}, 3, dtype=torch.uint8)
audio = torch.zeros(1, {samples})
with torch.no_grad():
    visual_features, audio_features = model.visual(frames), model.audio(audio)
    # Unit vectors that are comparable between the modalities.
    visual, audio = model.project_visual(visual_features), model.project_audio(audio_features)"""
    return "Audio-visual encoders and classifiers, trained with distav.", input_lines, usage


def _origin(tower: TowerConfig) -> str:
    """Return name, source and license of a tower."""
    source = tower.architecture.get("source") or tower.weights
    if not source or tower.weights == "none":
        return f"`{tower.name}` (random initial weights)"
    return f"`{tower.name}` (initial weights: {source}, license: {tower.architecture.get('license', 'see the source')})"


def _initial_export(run: Run) -> str:
    source = run.config.model.pretrained
    if not source:
        return ""
    return f"\n- Initial weights: the export `{source}`, where name and shape match; license: see its model card."


def _noise_estimates(run: Run, report: dict[str, Any]) -> str:
    """Return the noise rates of the last label correction."""
    if not report.get("corrections"):
        return "not estimated"
    last = report["corrections"][-1]
    rates = {"label noise rate": "label_noise_rate", "pair mismatch rate": "pair_mismatch_rate"}
    if last.get("multi_label"):
        rates = {"missing label rate": "missing_label_rate", "wrong label rate": "wrong_label_rate"}
    if run.state.correction is None or not run.state.correction.has_signal:
        return "not estimated, since k-NN votes carry no label signal"
    estimates = []
    for name, key in rates.items():
        rate = last[key]
        is_known = rate["ci95_high"] - rate["ci95_low"] <= MAX_INTERVAL_WIDTH
        estimate = f"{rate['estimate']:.1%}" if is_known else "not identified"
        estimates.append(f"{name} {estimate} (95 % interval {rate['ci95_low']:.1%} to {rate['ci95_high']:.1%})")
    return ", ".join(estimates)


def _metrics(run: Run, report: dict[str, Any]) -> str:
    figures = {name: report[name] for name in _FIGURES if name in report}
    if "test" in figures:  # Datasets may have hundreds of classes.
        figures["test"] = {name: value for name, value in figures["test"].items() if name != "by_class"}
    test = run.data.test
    split = "There is no test split." if test is None else f"The test split `{test.name}` has {len(test)} clips."
    if not figures:
        return f"{split}\n"
    entries = "; ".join(f"`{name}`: {_FIGURES[name]}" for name in figures)
    return f"{split} {entries}.\n\n```json\n{json.dumps(figures, indent=1)}\n```\n"
