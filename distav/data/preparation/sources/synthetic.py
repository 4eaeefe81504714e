"""Rendered clips with classes that only video and audio together determine.

Three shapes and three timbres form six classes. Each shape occurs with two timbres and each timbre with two shapes, so
one modality alone classifies at most half of the clips correctly. Larger shapes have a lower pitch.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from distav.config.cli import check_minimums
from distav.data.preparation.encoding import Clip, ClipSource, Encoding

CLASSES = (
    ("disc", "tone"),
    ("disc", "sweep"),
    ("cross", "sweep"),
    ("cross", "pulse"),
    ("bars", "pulse"),
    ("bars", "tone"),
)


@dataclass(frozen=True)
class SyntheticSource:
    """`synthetic`: clips rendered from a seed."""

    description: ClassVar[str] = "Render clips whose class depends on both modalities."
    example: ClassVar[str] = "make_shards.py synthetic shards/quickstart --train-clips 1200 --label-noise symmetric:0.4"
    default_encoding: ClassVar[Encoding] = Encoding(short_side=40, clip_s=1.0, sample_rate_hz=8000)
    allowed_modalities: ClassVar[tuple[str, ...]] = ("both",)

    train_clips: int = 1200
    test_clips: int = 300

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the numbers of clips."""
        add = parser.add_argument
        add("--train-clips", type=int, default=1200, help="clips in the training split (default: %(default)s)")
        add("--test-clips", type=int, default=300, help="clips in the test split (default: %(default)s)")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Self:
        """Return the source for parsed options."""
        check_minimums(options, train_clips=1, test_clips=0)
        return cls(options.train_clips, options.test_clips)

    def candidates(self) -> list[ClipSource]:
        """Return the clips to render, with cyclic classes."""
        return [
            ClipSource(f"{split}-scene-{number}", "+".join(CLASSES[number % len(CLASSES)]), split)
            for split, count in (("train", self.train_clips), ("test", self.test_clips))
            for number in range(count)
        ]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Render one clip."""
        shape, timbre = candidate.label.split("+")
        size = rng.uniform(0.5, 1.0)
        yield Clip(_render_frames(shape, size, encoding, rng), _render_audio(timbre, size, encoding, rng))


def _render_frames(shape: str, size: float, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    """Return frames [T, H, W, 3] uint8 of a moving and rotating shape under uneven lighting."""
    side = encoding.side
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    background, foreground = rng.uniform(0, 0.5, 3), rng.uniform(0.5, 1.0, 3)
    light_slope = rng.uniform(-0.25, 0.25, 2)
    radius, start_angle, rotation = 0.3 + 0.25 * size, rng.uniform(0, np.pi), rng.uniform(-0.6, 0.6)
    start, velocity = rng.uniform(-0.35, 0.35, 2), rng.uniform(-0.3, 0.3, 2)
    frames = np.empty((encoding.num_frames, side, side, 3), np.float32)
    for index in range(encoding.num_frames):
        time = index / max(1, encoding.num_frames - 1)
        v, u = y - start[0] - velocity[0] * time, x - start[1] - velocity[1] * time
        angle = start_angle + rotation * time
        along, across = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
        inside = np.maximum(np.abs(along), np.abs(across)) < radius
        if shape == "disc":
            mask = u**2 + v**2 < radius**2
        elif shape == "cross":
            mask = inside & (np.minimum(np.abs(along), np.abs(across)) < radius / 4)
        else:
            mask = inside & (np.sin(along / radius * 3 * np.pi) > 0)
        light = (1 + light_slope[0] * y + light_slope[1] * x)[..., None]
        frames[index] = np.where(mask[..., None], foreground, background) * light
    frames += rng.normal(0, 0.06, frames.shape)
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def _render_audio(timbre: str, size: float, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    """Return a waveform [N] float32: a steady tone, a frequency sweep or pulses."""
    rate = encoding.sample_rate_hz
    time = np.arange(encoding.num_audio_samples) / rate
    pitch = min(rate / 10, 1200.0) * (1.3 - size) * rng.uniform(0.9, 1.1)
    phase = rng.uniform(0, 2 * np.pi)
    if timbre == "tone":
        wave = np.sin(2 * np.pi * pitch * time + phase) + 0.4 * np.sin(4 * np.pi * pitch * time)
    elif timbre == "sweep":
        period = rng.uniform(0.35, 0.6)
        depth = 0.6 * pitch * period / (2 * np.pi)
        wave = np.sin(2 * np.pi * pitch * time + 2 * np.pi * depth * np.sin(2 * np.pi * time / period + phase))
    else:
        pulse_rate = rng.uniform(4, 7)
        gate = np.sin(2 * np.pi * pulse_rate * time + phase) > 0
        wave = gate * (np.sin(2 * np.pi * pitch * time) + 0.4 * np.sin(4 * np.pi * pitch * time))
    wave = 0.3 * wave / (np.abs(wave).max() + 1e-6) * rng.uniform(0.6, 1.2)
    return (wave + rng.normal(0, 0.02, wave.shape)).astype(np.float32)
