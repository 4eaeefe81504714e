"""Synthetic features and labels with known noise."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distav.data.modalities import MODALITIES
from distav.noise.correction import Correction, CorrectionPrior
from distav.noise.label_correction import correct_labels
from distav.noise.vote_search import FeatureSpace, VoteSearchSpace

NUM_CLASSES = 10
SEARCH_SPACE = VoteSearchSpace(num_neighbors=(20, 60), second_round_neighbors=(0, 20), vote_temperatures=(0.1, 0.3))


@dataclass
class Scene:
    """Features of Gaussian classes, given and true labels, and the classes of the audio."""

    visual: Tensor
    audio: Tensor
    given: Tensor
    true: Tensor
    audio_class: Tensor

    @property
    def mismatched(self) -> np.ndarray:
        return (self.true != self.audio_class).numpy()

    def correct(
        self,
        search_space: VoteSearchSpace = SEARCH_SPACE,
        prior: CorrectionPrior | None = None,
        teachers: tuple[Tensor, Tensor] | None = None,
        valid: Tensor | None = None,
        has_modality: dict[str, Tensor] | None = None,
    ) -> Correction:
        valid = torch.ones(len(self.given), dtype=torch.bool) if valid is None else valid
        has_modality = has_modality or dict.fromkeys(MODALITIES, valid)
        spaces, groups = [FeatureSpace("rows", self.visual, self.audio)], torch.arange(len(self.given))
        return correct_labels(spaces, self.given, NUM_CLASSES, groups, has_modality, search_space, prior, teachers)


def make_scene(label_noise: float, mismatched: float, num_samples: int = 1000, spread: float = 0.7) -> Scene:
    """Draw a scene with symmetric label noise and shuffled audio.

    Args:
        label_noise: fraction of wrong labels.
        mismatched: fraction of samples whose audio is shuffled.
        num_samples: number of samples.
        spread: standard deviation of the features around the center of their class.
    """
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    true = torch.arange(num_samples) % NUM_CLASSES
    audio_class = true.clone()
    shuffled = torch.from_numpy(rng.permutation(num_samples)[: int(mismatched * num_samples)])
    audio_class[shuffled] = true[shuffled.roll(1)]
    centers = torch.randn(2, NUM_CLASSES, 32, generator=generator)
    visual = centers[0][true] + spread * torch.randn(num_samples, 32, generator=generator)
    audio = centers[1][audio_class] + spread * torch.randn(num_samples, 32, generator=generator)
    given = true.clone()
    flipped = torch.from_numpy(rng.permutation(num_samples)[: int(label_noise * num_samples)])
    offsets = torch.from_numpy(rng.integers(1, NUM_CLASSES, len(flipped)))
    given[flipped] = (true[flipped] + offsets) % NUM_CLASSES
    return Scene(visual, audio, given, true, audio_class)


def flip_to_next_class(true: Tensor, rate: float) -> Tensor:
    """Return labels with asymmetric noise: each wrong label is the next class."""
    flipped = torch.rand(len(true), generator=torch.Generator().manual_seed(3)) < rate
    return torch.where(flipped, (true + 1) % NUM_CLASSES, true)


def teacher_probs(classes: Tensor, accuracy: float, seed: int) -> Tensor:
    """Return the class probabilities of a teacher whose errors do not depend on the given labels: [n, C]."""
    generator = torch.Generator().manual_seed(seed)
    guess = torch.randint(0, NUM_CLASSES, classes.shape, generator=generator)
    predicted = torch.where(torch.rand(classes.shape, generator=generator) < accuracy, classes, guess)
    noise = torch.randn(len(classes), NUM_CLASSES, generator=generator)
    return (2.5 * F.one_hot(predicted, NUM_CLASSES) + 0.5 * noise).softmax(1)


def accuracy(probs: Tensor, classes: Tensor) -> float:
    return float((probs.argmax(1) == classes).float().mean())
