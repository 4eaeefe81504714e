"""Random or fixed transforms of clips: crop, flip, colors, start frame, audio shift and gain.

A random transform is a function of (seed, epoch, id) only.
"""

from dataclasses import dataclass

import numpy as np

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import Split


@dataclass(frozen=True)
class ClipTransform:
    """Transform of one clip.

    Attributes:
        start_frame: first stored frame.
        crop: [4] float32 top, left, bottom, right as fractions of height and width.
        flip: whether frames are mirrored horizontally.
        color: [4] float32 factors of brightness, contrast and saturation, and a rotation of the hue in degrees.
        audio_start: first audio sample; negative for silence before the beginning of the clip.
        gain: factor of the amplitude.
        size: stored height and width in pixels; 1 for clips without frames.
    """

    start_frame: int
    crop: np.ndarray
    flip: bool
    color: np.ndarray
    audio_start: int
    gain: float
    size: tuple[int, int]


_FULL_FRAME = np.array([0, 0, 1, 1], np.float32)


class ClipTransformSampler:
    """Samples a transform for each clip.

    Args:
        split: the split of the clips.
        data: number, stride and size of frames, and length of the audio.
        augment: ranges of the random transforms; None: fixed transforms without augmentation.
        seed: seed of the run.
        views: number of evenly spaced clips without augmentation; the epoch of a clip is the index of its view.
    """

    def __init__(self, split: Split, data: DataConfig, augment: AugmentConfig | None, seed: int, views: int = 1):
        self.split, self.data, self.augment, self.seed, self.views = split, data, augment, seed, views
        self.span = (data.num_frames - 1) * data.frame_stride + 1
        """Stored frames from the first to the last selected one."""

    def sample(self, sample: int, epoch: int) -> ClipTransform:
        """Return the transform of a clip in an epoch; without augmentation, its center, or one of several views."""
        columns = self.split.columns
        num_frames = int(columns["frames"][sample]) or round(float(columns["duration_s"][sample]) * self.split.fps)
        slack = max(0, num_frames - self.span)
        size = max(1, int(columns["height"][sample])), max(1, int(columns["width"][sample]))
        if self.augment is None:
            start = slack // 2 if self.views == 1 else round(slack * epoch / (self.views - 1))
            return self._fixed(sample, start, size)
        rng, augment = np.random.default_rng([self.seed, 5, epoch, sample]), self.augment
        start = int(rng.integers(0, slack + 1))
        crop = _random_crop(*size, augment, rng)
        strengths = np.array([augment.brightness, augment.contrast, augment.saturation, 180 * augment.hue])
        color = (np.array([1, 1, 1, 0]) + strengths * rng.uniform(-1, 1, 4)).astype(np.float32)
        shift = augment.audio_shift_s * rng.uniform(-1, 1)
        gain = 1 + augment.gain * rng.uniform(-1, 1)
        flip = bool(rng.uniform() < augment.flip_prob)
        return ClipTransform(start, crop, flip, color, self._audio_start(sample, start, shift), gain, size)

    def _fixed(self, sample: int, start: int, size: tuple[int, int]) -> ClipTransform:
        color = np.array([1, 1, 1, 0], np.float32)
        crop = _FULL_FRAME if self.data.squash else _center_crop(*size)
        return ClipTransform(start, crop, False, color, self._audio_start(sample, start, 0.0), 1.0, size)

    def _audio_start(self, sample: int, start_frame: int, shift_s: float) -> int:
        """Center the audio on the frames, move it inside the clip if it fits, then shift it."""
        duration = float(self.split.columns["duration_s"][sample])
        center = (start_frame + self.span / 2) / self.split.fps
        latest = max(0.0, duration - self.data.audio_s)
        start = min(max(0.0, center - self.data.audio_s / 2), latest)
        return round((start + shift_s) * self.split.sample_rate_hz)


def _center_crop(height: int, width: int) -> np.ndarray:
    """Return the largest centered square."""
    side = min(height, width)
    top, left = (height - side) / 2 / height, (width - side) / 2 / width
    return np.array([top, left, 1 - top, 1 - left], np.float32)


def _random_crop(height: int, width: int, augment: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Return a crop of random area and aspect ratio; after ten failed attempts, the center crop."""
    for _ in range(10):
        area = rng.uniform(augment.crop_area_min, 1) * height * width
        aspect = np.exp(rng.uniform(-1, 1) * np.log(augment.crop_aspect_max))
        crop_width, crop_height = np.sqrt(area * aspect), np.sqrt(area / aspect)
        top, left = rng.uniform() * (height - crop_height), rng.uniform() * (width - crop_width)
        if crop_width <= width and crop_height <= height:
            box = [top / height, left / width, (top + crop_height) / height, (left + crop_width) / width]
            return np.array(box, np.float32)
    return _center_crop(height, width)
