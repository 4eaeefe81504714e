"""Towers by name: parameters, input, license of the weights, and memory and speed on this machine.

Weights are random, so nothing is downloaded: architecture, input and cost do not depend on them. Networks of
transformers are created from the settings of their repositories, which are those of the library's configuration
classes unless `REFERENCES` states others.
"""

import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distav.config.errors import UserError, did_you_mean, format_list
from distav.config.model import AudioConfig, ModelConfig, VisualConfig
from distav.config.schema import DataConfig
from distav.distributed.environment import machine
from distav.models.families.transformers_audio import DEFAULT_EXTRACTORS
from distav.models.tower_inputs import with_tower_inputs
from distav.models.towers import AudioTower, VisualTower
from tools.bench.timing import Setting

FPS = 30.0
"""Stored frames per second, which give the distance of frames where a tower states a frame rate."""
SAMPLE_RATE_HZ = 16000
"""Sample rate of the audio before the tower resamples it."""


@dataclass(frozen=True)
class Reference:
    """A tower of the table.

    Attributes:
        modality: visual or audio.
        license: license of the weights, as their source states it; empty for towers without weights.
        network: model type and settings that differ from the defaults, for networks of transformers.
        preprocessor: settings of the preprocessor that differ from the defaults.
    """

    modality: str
    license: str = ""
    network: dict[str, Any] = field(default_factory=dict[str, Any])
    preprocessor: dict[str, Any] = field(default_factory=dict[str, Any])


_TORCHVISION = "not stated; library: BSD-3-Clause"
_CLIP_MOMENTS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
REFERENCES = {
    "small_conv (visual)": Reference("visual"),
    "r2plus1d_18": Reference("visual"),
    "torchvision:resnet50@IMAGENET1K_V2": Reference("visual", _TORCHVISION),
    "torchvision:r2plus1d_18@KINETICS400_V1": Reference("visual", _TORCHVISION),
    "torchvision:swin3d_t@KINETICS400_V1": Reference("visual", _TORCHVISION),
    "torchvision:mvit_v2_s@KINETICS400_V1": Reference("visual", _TORCHVISION),
    "timm:tf_efficientnet_lite0.in1k": Reference("visual", "Apache-2.0"),
    "timm:vit_small_patch16_224.augreg_in1k": Reference("visual", "Apache-2.0"),
    "hf:openai/clip-vit-base-patch16": Reference(
        "visual", "MIT", {"model_type": "clip_vision_model", "patch_size": 16}, _CLIP_MOMENTS
    ),
    "hf:google/siglip-base-patch16-224": Reference("visual", "Apache-2.0", {"model_type": "siglip_vision_model"}),
    "hf:facebook/dinov2-base": Reference("visual", "Apache-2.0", {"model_type": "dinov2", "image_size": 518,
                                                                 "patch_size": 14}, {"crop_size": {"height": 224}}),
    "hf:MCG-NJU/videomae-base": Reference("visual", "CC-BY-NC-4.0", {"model_type": "videomae"}),
    "small_conv (audio)": Reference("audio"),
    "avid_conv": Reference("audio"),
    "hf:MIT/ast-finetuned-audioset-10-10-0.4593": Reference(
        "audio", "BSD-3-Clause", {"model_type": "audio-spectrogram-transformer"}
    ),
    "hf:laion/clap-htsat-unfused": Reference(
        "audio", "Apache-2.0", {"model_type": "clap_audio_model"}, {"truncation": "rand_trunc"}
    ),
    "hf:facebook/wav2vec2-base": Reference("audio", "Apache-2.0", {"model_type": "wav2vec2"}),
    "hf:openai/whisper-base": Reference(
        "audio", "Apache-2.0", {"model_type": "whisper", "d_model": 512, "encoder_layers": 6, "decoder_layers": 6,
                                "encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_ffn_dim": 2048,
                                "decoder_ffn_dim": 2048}
    ),
}  # fmt: skip
"""Towers of the table by their names; the modality is appended where both have a tower of that name."""


def run(setting: Setting, names: Sequence[str], batch: int) -> dict[str, Any]:
    """Measure towers, each in a process of its own.

    Args:
        setting: device, threads, rounds.
        names: keys of `REFERENCES`; empty for all.
        batch: clips per step.

    Raises:
        UserError: for a name that is not in the table.
    """
    for name in names:
        if name not in REFERENCES:
            raise UserError(f"tower {name}: allowed: {format_list(REFERENCES)}.{did_you_mean(name, REFERENCES)}")
    rows = []
    for name in names or REFERENCES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(_measure, setting, name, batch).result())
        print(f"{name}: {rows[-1]['train_clips_per_s']:.3g} clips/s in training", file=sys.stderr)
    arguments = {"batch": batch, "threads": setting.threads, "device": setting.device.type}
    return {"machine": machine(), "arguments": arguments, "rows": rows}


def _measure(setting: Setting, name: str, batch: int) -> dict[str, Any]:
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    device, before = setting.device, _resident_mib("VmRSS")
    reference = REFERENCES[name]
    tower, clips, description = build(name, batch)
    tower, clips = tower.to(device), clips.to(device)
    seeds = torch.arange(batch, device=device)

    def train() -> None:
        tower.zero_grad()
        tower(clips, seeds).float().square().mean().backward()

    def encode() -> None:
        with torch.no_grad():
            tower(clips)

    tower.train()
    train_s = _median_seconds(train, setting)
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _resident_mib("VmHWM") - before
    tower.eval()
    return {
        "name": name,
        "modality": reference.modality,
        "license": reference.license,
        "parameters": sum(parameter.numel() for parameter in tower.net.parameters()),
        "feature_dim": tower.feature_dim,
        "input": description,
        "train_mib": peak,
        "train_clips_per_s": batch / train_s,
        "encode_clips_per_s": batch / _median_seconds(encode, setting),
    }


def build(name: str, batch: int) -> tuple[VisualTower | AudioTower, Tensor, str]:
    """Return a tower of the table with random weights, a batch of clips, and the description of its input."""
    reference = REFERENCES[name]
    settings: dict[str, Any] = {"name": name.partition(" ")[0], "weights": "none"}
    if reference.network:
        settings["architecture"] = _architecture(reference)
    if reference.modality == "visual":
        config = ModelConfig(visual=VisualConfig(**settings))
        data = with_tower_inputs(DataConfig(), config, FPS)
        size = data.frame_size
        frames = torch.randint(0, 256, (batch, data.num_frames, size, size, 3), dtype=torch.uint8)
        return VisualTower(config.visual, data, False), frames, f"{data.num_frames} x {size} x {size}"
    config = ModelConfig(audio=AudioConfig(**settings))
    data = with_tower_inputs(DataConfig(), config, FPS)
    tower = AudioTower(config.audio, data, SAMPLE_RATE_HZ, False)
    extractor = getattr(tower.front_end, "extractor", None)
    rate = extractor.sample_rate_hz if extractor else SAMPLE_RATE_HZ
    audio = 0.1 * torch.randn(batch, round(data.audio_s * SAMPLE_RATE_HZ))
    return tower, audio, f"{data.audio_s:g} s, {rate / 1000:g} kHz"


def _architecture(reference: Reference) -> dict[str, Any]:
    import transformers

    settings = transformers.AutoConfig.for_model(**reference.network)
    model_type = settings.model_type
    preprocessor = dict(reference.preprocessor)
    if reference.modality == "audio":
        default = DEFAULT_EXTRACTORS.get(model_type, "Wav2Vec2FeatureExtractor")
        preprocessor = {"feature_extractor_type": default} | preprocessor
    network = settings.to_dict() | {"model_type": model_type}
    return {"network": network, "preprocessor": preprocessor, "source": "", "license": reference.license}


def _median_seconds(step: Callable[[], None], setting: Setting) -> float:
    return statistics.median(replace(setting, threads=0).interleaved({"step": step})["step"])  # 0: wall time


def _resident_mib(field_name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field_name + ":")) / 1024


def table(results: dict[str, Any]) -> str:
    """Return the measurements as a Markdown table."""
    head = ("tower", "parameters", "features", "input", "license of the weights", "memory", "training", "encoding")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        cells = (
            f"`{row['name']}`" if " " not in row["name"] else "`{}` {}".format(*row["name"].split(" ", 1)),
            f"{row['parameters'] / 1e6:.1f} M",
            str(row["feature_dim"]),
            row["input"].replace(" x ", " × "),
            row["license"] or "no weights",
            f"{row['train_mib'] / 1024:.1f} GiB",
            f"{row['train_clips_per_s']:.3g}",
            f"{row['encode_clips_per_s']:.3g}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
