"""Rendered scenes whose class shows only in picture and sound together.

Three shapes and three sounds make six classes: each shape goes with two sounds and each sound with two shapes, so
that either one alone is right half of the time. The larger the shape, the lower its sound.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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
    """`synthetic`: scenes rendered from a seed."""

    train_clips: int = 1200
    test_clips: int = 300

    def candidates(self) -> list[ClipSource]:
        """Return the scenes to render, classes in turn."""
        return [
            ClipSource(f"{split}-scene-{number}", "+".join(CLASSES[number % len(CLASSES)]), split)
            for split, count in (("train", self.train_clips), ("test", self.test_clips))
            for number in range(count)
        ]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Render one scene."""
        shape, voice = candidate.label.split("+")
        size = rng.uniform(0.5, 1.0)
        yield Clip(_render_frames(shape, size, encoding, rng), _render_audio(voice, size, encoding, rng))


def _render_frames(shape: str, size: float, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    side = encoding.side
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    ground, ink = rng.uniform(0, 0.5, 3), rng.uniform(0.5, 1.0, 3)
    slope = rng.uniform(-0.25, 0.25, 2)
    reach, angle, turn = 0.3 + 0.25 * size, rng.uniform(0, np.pi), rng.uniform(-0.6, 0.6)
    start, speed = rng.uniform(-0.35, 0.35, 2), rng.uniform(-0.3, 0.3, 2)
    frames = np.empty((encoding.num_frames, side, side, 3), np.float32)
    for number in range(encoding.num_frames):
        moment = number / max(1, encoding.num_frames - 1)
        v, u = y - start[0] - speed[0] * moment, x - start[1] - speed[1] * moment
        theta = angle + turn * moment
        along, across = u * np.cos(theta) + v * np.sin(theta), v * np.cos(theta) - u * np.sin(theta)
        inside = np.maximum(np.abs(along), np.abs(across)) < reach
        if shape == "disc":
            mask = u**2 + v**2 < reach**2
        elif shape == "cross":
            mask = inside & (np.minimum(np.abs(along), np.abs(across)) < reach / 4)
        else:
            mask = inside & (np.sin(along / reach * 3 * np.pi) > 0)
        light = (1 + slope[0] * y + slope[1] * x)[..., None]
        frames[number] = np.where(mask[..., None], ink, ground) * light
    frames += rng.normal(0, 0.06, frames.shape)
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def _render_audio(voice: str, size: float, encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    rate = encoding.sample_rate_hz
    time = np.arange(encoding.num_audio_samples) / rate
    pitch = min(rate / 10, 1200.0) * (1.3 - size) * rng.uniform(0.9, 1.1)
    phase = rng.uniform(0, 2 * np.pi)
    if voice == "tone":
        wave = np.sin(2 * np.pi * pitch * time + phase) + 0.4 * np.sin(4 * np.pi * pitch * time)
    elif voice == "sweep":
        period = rng.uniform(0.35, 0.6)
        bend = 0.6 * pitch * period / (2 * np.pi)
        wave = np.sin(2 * np.pi * pitch * time + 2 * np.pi * bend * np.sin(2 * np.pi * time / period + phase))
    else:
        beat = rng.uniform(4, 7)
        gate = np.sin(2 * np.pi * beat * time + phase) > 0
        wave = gate * (np.sin(2 * np.pi * pitch * time) + 0.4 * np.sin(4 * np.pi * pitch * time))
    wave = 0.3 * wave / (np.abs(wave).max() + 1e-6) * rng.uniform(0.6, 1.2)
    return (wave + rng.normal(0, 0.02, wave.shape)).astype(np.float32)
