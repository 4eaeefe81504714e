"""The whole network: two towers and their heads.

Legend: B clips, E tower width, D embedding width, K categories, C classes.
"""

import math

import torch
from torch import Tensor, nn

from distav.config.schema import DataConfig, ModelConfig
from distav.models.audio_encoders import build_audio
from distav.models.event_parser import TokenSpec, build_parser
from distav.models.heads import CategoryHead, Classifiers, Projection
from distav.models.visual_encoders import build_visual

HEADS = (
    "project_visual",
    "project_audio",
    "categorise_visual",
    "categorise_audio",
    "classify",
    "log_temperature",
    "parse",
)
TEMPERATURE, TEMPERATURE_MIN = 0.07, 0.01


class AVModel(nn.Module):
    """Audio and visual towers with projection, category and classifier heads; and, over segments, an event parser."""

    def __init__(
        self, settings: ModelConfig, data: DataConfig, sample_rate_hz: int, num_classes: int, segments: int = 0
    ):
        super().__init__()
        recompute = settings.activation_checkpointing
        self.visual = build_visual(settings.visual, data, recompute)
        self.audio = build_audio(settings.audio, data, sample_rate_hz, recompute)
        widths = self.visual.feature_dim, self.audio.feature_dim
        hidden = settings.hidden_dim
        num_categories = settings.num_categories or num_classes
        self.project_visual = Projection(widths[0], hidden, settings.embed_dim)
        self.project_audio = Projection(widths[1], hidden, settings.embed_dim)
        self.categorise_visual = CategoryHead(widths[0], hidden, num_categories)
        self.categorise_audio = CategoryHead(widths[1], hidden, num_categories)
        self.classify = Classifiers(*widths, num_classes, settings.dropout)
        self.segments = segments
        if segments:
            seen, heard = (TokenSpec(name, width) for name, width in zip(("visual", "audio"), widths, strict=True))
            self.parse = build_parser(settings.parser, [heard], [seen], num_classes, segments)
        if settings.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(TEMPERATURE)]))

    def forward(self, frames: Tensor, audio: Tensor, seeds: Tensor, parse: bool = False) -> dict[str, Tensor]:
        """Run towers and heads; or, to `parse`, the towers on each segment of the clip and the event parser.

        Args:
            frames: [B, T, H, W, 3] uint8.
            audio: [B, N] float32 in [-1, 1].
            seeds: [B] int64, the random numbers of masks and dropout.

        Returns:
            visual_features, audio_features [B, E]; visual, audio [B, D] unit vectors; visual_categories,
            audio_categories [B, K] logits; logits, visual_logits, audio_logits [B, C]; and, where it is learnt, the
            temperature of the instance loss, a number. To `parse`: what `distav.models.event_parser.Parsed` holds.
        """
        if parse:
            return self._parsed(frames, audio, seeds)
        visual, audio = self.visual(frames), self.audio(audio, seeds)
        both, by_picture, by_sound = self.classify(visual, audio, seeds)
        learnt = {}
        if hasattr(self, "log_temperature"):
            learnt["temperature"] = self.log_temperature.clamp(math.log(TEMPERATURE_MIN), 0.0).exp().squeeze(0)
        return {
            "visual_features": visual,
            "audio_features": audio,
            "visual": self.project_visual(visual),
            "audio": self.project_audio(audio),
            "visual_categories": self.categorise_visual(visual),
            "audio_categories": self.categorise_audio(audio),
            "logits": both,
            "visual_logits": by_picture,
            "audio_logits": by_sound,
            **learnt,
        }

    def _parsed(self, frames: Tensor, sound: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        clips, each = len(frames), sound.shape[1] // self.segments
        frames = frames.unflatten(1, (self.segments, -1)).flatten(0, 1)
        sound = sound[:, : each * self.segments].reshape(clips * self.segments, each)
        places = torch.arange(self.segments, device=seeds.device)
        visual = self.visual(frames).unflatten(0, (clips, -1))
        audio = self.audio(sound, (seeds[:, None] + places).flatten()).unflatten(0, (clips, -1))
        return self.parse([audio], [visual], seeds)._asdict()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Split parameters into towers and heads, with weight decay for matrices and kernels alone.

    Each group carries `part`: "towers" or "heads", by which a phase sets its learning rate.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = "heads" if name.split(".")[0] in HEADS else "towers"
        # Names and not dims, since ZeRO-3 leaves only empty vectors of the parameters here.
        decayed = name.endswith("weight") and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        groups.setdefault((part, decayed), []).append(parameter)
    return [
        {"params": members, "part": part, "weight_decay": weight_decay if decayed else 0.0}
        for (part, decayed), members in groups.items()
    ]
