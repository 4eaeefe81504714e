"""The network: two towers and their heads.

Legend: B clips, E tower width, D embedding width, K categories, C classes.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from distav.config.errors import UserError
from distav.config.model import ModelConfig, TowerConfig
from distav.config.registry import Registry
from distav.config.schema import DataConfig
from distav.distributed.deepspeed_internals import full_shape
from distav.models.event_parser import TokenSpec, build_parser
from distav.models.heads import CategoryHead, Classifiers, Projection
from distav.models.input_checks import check_audio, check_frames, check_seeds
from distav.models.towers import AUDIO_TOWERS, VISUAL_TOWERS, AudioTower, Tower, VisualTower

INITIAL_TEMPERATURE, MIN_TEMPERATURE = 0.07, 0.01


def check_towers(config: ModelConfig, parses_clips: bool = False) -> None:
    """Check the names of both towers; building the model checks them too, but only after the data has been opened.

    Args:
        config: settings of the model.
        parses_clips: whether a phase of kind parsing passes single segments of clips to the towers.

    Raises:
        UserError: for an unknown tower, or one that does not support segments where it has to.
    """
    _check_tower(VISUAL_TOWERS, config.visual, parses_clips)
    _check_tower(AUDIO_TOWERS, config.audio, parses_clips)


def _check_tower(towers: Registry[Any], config: TowerConfig, parses_clips: bool) -> None:
    tower = towers.select(config.name)
    tower.check(config)
    if parses_clips and not tower.supports_segments:
        allowed = [towers.describe(other) for other in towers if towers[other].supports_segments]
        raise UserError(
            f"{towers.key}={config.name}: allowed: {', '.join(allowed)}, since a phase of kind parsing encodes single "
            "segments of a clip."
        )


class AVModel(nn.Module):
    """Audio and visual towers with projection, category and classifier heads, and optionally an event parser.

    Args:
        config: settings of towers and heads.
        data: settings of the clips.
        sample_rate_hz: sample rate of the audio.
        num_classes: C.
        num_segments: segments of a clip for event parsing; 0 for no event parser.

    Raises:
        UserError: for an unknown tower, or one that does not support the clips or their segments.
    """

    def __init__(
        self, config: ModelConfig, data: DataConfig, sample_rate_hz: int, num_classes: int, num_segments: int = 0
    ):
        super().__init__()
        check_towers(config, num_segments > 0)
        self.visual = VisualTower(config.visual, data, config.activation_checkpointing)
        self.audio = AudioTower(config.audio, data, sample_rate_hz, config.activation_checkpointing)
        visual_dim, audio_dim = self.visual.feature_dim, self.audio.feature_dim
        num_categories = config.num_categories or num_classes
        self.project_visual = Projection(visual_dim, config.hidden_dim, config.embed_dim)
        self.project_audio = Projection(audio_dim, config.hidden_dim, config.embed_dim)
        self.categorize_visual = CategoryHead(visual_dim, config.hidden_dim, num_categories)
        self.categorize_audio = CategoryHead(audio_dim, config.hidden_dim, num_categories)
        self.classify = Classifiers(visual_dim, audio_dim, num_classes, config.dropout)
        for towers, name, tower in (
            (VISUAL_TOWERS, config.visual.name, self.visual),
            (AUDIO_TOWERS, config.audio.name, self.audio),
        ):
            if num_segments and not tower.net.supports_segments:
                raise UserError(
                    f"{towers.key}={name}: this network takes complete clips only; choose another one, since a "
                    "phase of kind parsing encodes single segments of a clip."
                )
        self.segments = num_segments
        if num_segments:
            audio_tokens, visual_tokens = [TokenSpec("audio", audio_dim)], [TokenSpec("visual", visual_dim)]
            self.parse = build_parser(config.parser, audio_tokens, visual_tokens, num_classes, num_segments)
        if config.learnable_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(INITIAL_TEMPERATURE)]))

    def forward(self, frames: Tensor, audio: Tensor, seeds: Tensor, parse: bool = False) -> dict[str, Tensor]:
        """Run towers and heads; with `parse`, run the towers on each segment of the clip and then the event parser.

        Args:
            frames: [B, T, H, W, 3] uint8.
            audio: [B, N] float32 in [-1, 1].
            seeds: [B] int64, seeds of masks and dropout.
            parse: whether to parse events.

        Returns:
            visual_features, audio_features [B, E]; visual, audio [B, D] unit vectors; visual_categories,
            audio_categories [B, K] logits; logits, visual_logits, audio_logits [B, C]; and, if it is learned, the
            temperature of the instance loss, a scalar. With `parse`: the fields of
            `distav.models.event_parser.Parsed`.

        Raises:
            ValueError: for an input of another type or shape, or if there is no event parser.
        """
        self._check_inputs(frames, audio, seeds, parse)
        if parse:
            return self._parse_segments(frames, audio, seeds)
        visual_features, audio_features = self.visual(frames, seeds), self.audio(audio, seeds)
        logits, visual_logits, audio_logits = self.classify(visual_features, audio_features, seeds)
        outputs = {
            "visual_features": visual_features,
            "audio_features": audio_features,
            "visual": self.project_visual(visual_features),
            "audio": self.project_audio(audio_features),
            "visual_categories": self.categorize_visual(visual_features),
            "audio_categories": self.categorize_audio(audio_features),
            "logits": logits,
            "visual_logits": visual_logits,
            "audio_logits": audio_logits,
        }
        if hasattr(self, "log_temperature"):
            outputs["temperature"] = self.log_temperature.clamp(math.log(MIN_TEMPERATURE), 0.0).exp().squeeze(0)
        return outputs

    def _check_inputs(self, frames: Tensor, audio: Tensor, seeds: Tensor, parse: bool) -> None:
        check_frames(frames)
        check_audio(audio)
        check_seeds(seeds, len(frames))
        if len(audio) != len(frames):
            raise ValueError(f"audio: {len(audio)} clips; allowed: {len(frames)}, as many as `frames` has.")
        if parse and not self.segments:
            raise ValueError("parse: this network has no event parser; create it with num_segments above 0.")
        if parse and frames.shape[1] % self.segments:
            raise ValueError(
                f"frames: {frames.shape[1]} frames per clip; allowed: a multiple of {self.segments}, the number of "
                "segments."
            )

    def _parse_segments(self, frames: Tensor, audio: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        num_clips, segment_length = len(frames), audio.shape[1] // self.segments
        frames = frames.unflatten(1, (self.segments, -1)).flatten(0, 1)
        audio = audio[:, : segment_length * self.segments].reshape(num_clips * self.segments, segment_length)
        segment_seeds = (seeds[:, None] + torch.arange(self.segments, device=seeds.device)).flatten()
        visual_features = self.visual(frames, segment_seeds).unflatten(0, (num_clips, -1))
        audio_features = self.audio(audio, segment_seeds).unflatten(0, (num_clips, -1))
        return self.parse([audio_features], [visual_features], seeds)._asdict()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Group the trained parameters of a model by learning rate and weight decay, for the optimizer.

    Parameters inside a module with `lr_group = "towers"` belong to the towers, all other parameters to the heads. A new
    head therefore trains at the learning rate of heads without further declaration. Matrices and kernels have weight
    decay, vectors have none.

    Returns:
        Parameter groups with `params`, `weight_decay`, `lr_group` ("towers" or "heads"), `lr_scale`, a factor on the
        learning rate of the group that a phase sets, and `first_epoch`, before which the parameters are not trained.
    """
    tower_parameters = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "lr_group", "heads") == "towers"
        for parameter in module.parameters()
    }
    options = {
        id(parameter): module.learning_options(name)
        for module in model.modules()
        if isinstance(module, Tower)
        for name, parameter in module.net.named_parameters()
    }
    groups: dict[tuple[str, float, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr_group = "towers" if id(parameter) in tower_parameters else "heads"
        decays = name.endswith("weight") and len(full_shape(parameter)) > 1
        groups.setdefault((lr_group, *options.get(id(parameter), (1.0, 0)), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_group": lr_group,
            "lr_scale": lr_scale,
            "first_epoch": first_epoch,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (lr_group, lr_scale, first_epoch, decays), parameters in groups.items()
    ]
