"""What is done to a clip on its way to the towers: drawn from (seed, epoch, id) alone, or fixed for evaluation."""

from dataclasses import dataclass

import numpy as np

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import Split


@dataclass(frozen=True)
class ClipTransform:
    """How one clip is looked at.

    Attributes:
        start_frame: first stored frame fed to the visual tower.
        crop: [4] float32 top, left, bottom, right as shares of height and width.
        flip: whether left and right are exchanged.
        colour: [4] float32 factors of brightness, contrast and saturation, and a hue turn in degrees.
        audio_start: first audio sample; may lie before the beginning, where there is silence.
        gain: factor on the amplitude.
        size: stored height and width in pixels.
    """

    start_frame: int
    crop: np.ndarray
    flip: bool
    color: np.ndarray
    audio_start: int
    gain: float
    size: tuple[int, int]


_WHOLE = np.array([0, 0, 1, 1], np.float32)


class ClipTransformSampler:
    """Draws a view for each sample."""

    def __init__(self, split: Split, data: DataConfig, augment: AugmentConfig | None, seed: int):
        self.split, self.data, self.augment, self.seed = split, data, augment, seed
        self.span = (data.num_frames - 1) * data.frame_stride + 1

    def sample(self, sample: int, epoch: int) -> ClipTransform:
        """Return the view of a sample in an epoch; without augmentation, the middle of the clip."""
        columns = self.split.columns
        slack = max(0, int(columns["frames"][sample]) - self.span)
        height, width = int(columns["height"][sample]), int(columns["width"][sample])
        if self.augment is None:
            start = slack // 2
            colour = np.array([1, 1, 1, 0], np.float32)
            crop = _WHOLE if self.data.squash else _centre(height, width)
            return ClipTransform(
                start, crop, False, colour, self._audio_start(sample, start, 0.0), 1.0, (height, width)
            )
        rng, change = np.random.default_rng([self.seed, 5, epoch, sample]), self.augment
        start = int(rng.integers(0, slack + 1))
        crop = _random_crop(height, width, change, rng)
        strengths = np.array([change.brightness, change.contrast, change.saturation, 180 * change.hue])
        colour = (np.array([1, 1, 1, 0]) + strengths * rng.uniform(-1, 1, 4)).astype(np.float32)
        shift = change.audio_shift_s * rng.uniform(-1, 1)
        gain = 1 + change.gain * rng.uniform(-1, 1)
        flip = bool(rng.uniform() < change.flip_prob)
        return ClipTransform(start, crop, flip, colour, self._audio_start(sample, start, shift), gain, (height, width))

    def _audio_start(self, sample: int, start_frame: int, audio_shift_s: float) -> int:
        """Centre the sound on the frames, kept inside the clip where it can be, then shift it."""
        duration = float(self.split.columns["duration_s"][sample])
        middle = (start_frame + self.span / 2) / self.split.fps
        room = max(0.0, duration - self.data.audio_s)
        begin = min(max(0.0, middle - self.data.audio_s / 2), room)
        return round((begin + audio_shift_s) * self.split.sample_rate_hz)


def _centre(height: int, width: int) -> np.ndarray:
    """Return the largest square in the middle."""
    side = min(height, width)
    top, left = (height - side) / 2 / height, (width - side) / 2 / width
    return np.array([top, left, 1 - top, 1 - left], np.float32)


def _random_crop(height: int, width: int, change: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw a crop of random area and aspect; ten tries, then the centre."""
    for _ in range(10):
        area = rng.uniform(change.crop_area_min, 1) * height * width
        aspect = np.exp(rng.uniform(-1, 1) * np.log(change.crop_aspect_max))
        crop_width, crop_height = np.sqrt(area * aspect), np.sqrt(area / aspect)
        top, left = rng.uniform() * (height - crop_height), rng.uniform() * (width - crop_width)
        if crop_width <= width and crop_height <= height:
            box = [top / height, left / width, (top + crop_height) / height, (left + crop_width) / width]
            return np.array(box, np.float32)
    return _centre(height, width)
