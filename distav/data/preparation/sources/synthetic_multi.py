"""Rendered clips with several classes: each class of a clip is both visible and audible.

A class is a shape in its own color, and a tone with its own pitch and rhythm. Frequent and rare classes differ by a
factor of about two; a clip has one to three of them.
"""

import argparse
import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self

import numpy as np

from distav.config.cli import check_minimums
from distav.data.annotations.multi_labels import LABEL_SEPARATOR
from distav.data.preparation.encoding import Clip, ClipSource, Encoding
from distav.data.preparation.source import SourceInfo

CLASSES = ("bell", "bird", "car", "dog", "drum", "rain")
MAX_CLASSES = 3
"""Largest number of classes of a clip."""
_FREQUENT, _RARE = 1.0, 0.5
"""Relative frequencies of the first and of the last class."""


@dataclass(frozen=True)
class SyntheticMultiSource:
    """`synthetic-multi`: multi-label clips rendered from a seed."""

    description: ClassVar[str] = "Render clips that have several classes each."
    example: ClassVar[str] = (
        "make_shards.py synthetic-multi shards/multi --train-clips 1200 --missing-labels 0.2:0.4 --wrong-labels 0.03"
    )
    default_encoding: ClassVar[Encoding] = Encoding(short_side=40, clip_s=1.0, sample_rate_hz=8000)
    allowed_modalities: ClassVar[tuple[str, ...]] = ("both",)
    clip_seconds: ClassVar[float | None] = None

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

    def info(self) -> SourceInfo:
        """Return the classes."""
        return SourceInfo(list(CLASSES), multi_label=True)

    def candidates(self) -> list[ClipSource]:
        """Return the clips to render; their classes do not depend on the number of clips."""
        return [
            ClipSource(f"{split}-scene-{number}", LABEL_SEPARATOR.join(_draw_classes(seed, number)), split)
            for seed, (split, count) in enumerate((("train", self.train_clips), ("test", self.test_clips)))
            for number in range(count)
        ]

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        """Render one clip."""
        classes = [CLASSES.index(name) for name in candidate.label.split(LABEL_SEPARATOR)]
        yield Clip(_render_frames(classes, encoding, rng), _render_audio(classes, encoding, rng))


def _draw_classes(seed: int, number: int) -> list[str]:
    """Return the classes of a clip, in the order of `CLASSES`."""
    rng = np.random.default_rng([seed, number])
    frequencies = np.linspace(_FREQUENT, _RARE, len(CLASSES))
    count = int(rng.integers(1, MAX_CLASSES + 1))
    chosen = rng.choice(len(CLASSES), count, replace=False, p=frequencies / frequencies.sum())
    return [CLASSES[index] for index in sorted(chosen)]


def _render_frames(classes: list[int], encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    """Return frames [T, H, W, 3] uint8: the shapes of the classes move over a dark background."""
    side = encoding.side
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    frames = np.empty((encoding.num_frames, side, side, 3), np.float32)
    frames[:] = rng.uniform(0, 0.25, 3)
    for index in rng.permutation(classes):
        color = np.array(colorsys.hsv_to_rgb(index / len(CLASSES) + rng.uniform(-0.02, 0.02), 0.9, rng.uniform(0.7, 1)))
        radius, start, velocity = rng.uniform(0.3, 0.45), rng.uniform(-0.55, 0.55, 2), rng.uniform(-0.3, 0.3, 2)
        for number in range(encoding.num_frames):
            time = number / max(1, encoding.num_frames - 1)
            v, u = (y - start[0] - velocity[0] * time) / radius, (x - start[1] - velocity[1] * time) / radius
            frames[number][_shape(index, u, v)] = color
    frames += rng.normal(0, 0.05, frames.shape)
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def _shape(index: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the mask of a class in coordinates in which its shape reaches from -1 to 1: [H, W] bool."""
    inside, distance = np.maximum(np.abs(u), np.abs(v)) < 1, np.hypot(u, v)
    return (
        distance < 1,
        inside,
        inside & (np.minimum(np.abs(u), np.abs(v)) < 0.35),
        (distance < 1) & (distance > 0.5),
        inside & (np.sin(3 * np.pi * v) > 0),
        inside & (v > 2 * np.abs(u) - 1),
    )[index]


def _render_audio(classes: list[int], encoding: Encoding, rng: np.random.Generator) -> np.ndarray:
    """Return a waveform [N] float32: the sum of the tones of the classes."""
    rate = encoding.sample_rate_hz
    time = np.arange(encoding.num_audio_samples) / rate
    wave = np.zeros_like(time)
    for index in classes:
        pitch = _pitches(rate)[index] * rng.uniform(0.96, 1.04)
        rhythm = 1 + 0.8 * np.sin(2 * np.pi * (1 + index) * rng.uniform(0.9, 1.1) * time + rng.uniform(0, 2 * np.pi))
        wave += rng.uniform(0.6, 1) * rhythm * np.sin(2 * np.pi * pitch * time + rng.uniform(0, 2 * np.pi))
    wave = 0.3 * wave / (np.abs(wave).max() + 1e-6) * rng.uniform(0.8, 1.2)
    return (wave + rng.normal(0, 0.01, wave.shape)).astype(np.float32)


@lru_cache
def _pitches(rate: int) -> list[float]:
    """Return the pitch of each class in Hz, from 200 Hz to 0.4 of the sample rate."""
    return np.geomspace(200, 0.4 * rate, len(CLASSES)).tolist()
