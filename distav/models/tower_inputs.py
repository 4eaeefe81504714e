"""Settings that follow from the towers: their architecture, and the clips that they were made for."""

from dataclasses import replace

from distav.config.model import ModelConfig
from distav.config.schema import DataConfig
from distav.models.towers import AUDIO_TOWERS, VISUAL_TOWERS

DEFAULT_FRAME_STRIDE = 2
"""Distance of frames, in stored frames, for towers that state no frame rate."""


def describe_towers(config: ModelConfig) -> ModelConfig:
    """Return settings that contain what is needed to create the towers without the sources of their weights.

    Raises:
        UserError: if the description of a pretrained network cannot be read.
    """
    visual, audio = config.visual, config.audio
    return replace(
        config,
        visual=replace(visual, architecture=visual.architecture or VISUAL_TOWERS.select(visual.name).describe(visual)),
        audio=replace(audio, architecture=audio.architecture or AUDIO_TOWERS.select(audio.name).describe(audio)),
    )


def with_tower_inputs(data: DataConfig, config: ModelConfig, fps: float) -> DataConfig:
    """Return data settings in which those that are 0 have the values that the towers were made for.

    Args:
        data: settings of the clips.
        config: settings of the towers.
        fps: stored frames per second.

    Raises:
        UserError: for a setting that contradicts a tower.
    """
    encoder = VISUAL_TOWERS.select(config.visual.name)
    visual = encoder.input_format(config.visual)
    audio = AUDIO_TOWERS.select(config.audio.name).input_format(config.audio)
    stride = max(1, round(fps / visual.frame_rate_hz)) if visual.frame_rate_hz else DEFAULT_FRAME_STRIDE
    data = replace(
        data,
        num_frames=data.num_frames or visual.num_frames,
        frame_stride=data.frame_stride or stride,
        frame_size=data.frame_size or visual.frame_size,
        audio_s=data.audio_s or audio.audio_s,
    )
    encoder.check_input(config.visual, data)
    return data
